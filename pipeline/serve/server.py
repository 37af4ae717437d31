"""An artifact at a port, until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import ServeOptions
from edgepress.pipeline.registry import require

if TYPE_CHECKING:
    import uvicorn
    from edgepress.pipeline.serve.engine import Engine

log = logging.getLogger("edgepress")
KEY = "EDGEPRESS_API_KEY"
GRACE = 1  # seconds that answers under way have when the server ends


def serve(folder: Path, options: ServeOptions) -> None:
    """Load the artifact in ``folder`` and answer requests until the process is interrupted.

    Raises OptionError for a port or address that cannot be had, MissingPackageError without the extra ``serve``, InputError when
    the folder is not an artifact, or not whole.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package)
    import uvicorn
    from edgepress.pipeline.serve.app import application, is_local
    from edgepress.pipeline.serve.engine import Engine

    options = replace(options, api_key=options.api_key or os.environ.get(KEY) or None)
    listening = _bound(options)
    try:
        host, port = listening.getsockname()[:2]
        engine = Engine(folder, replace(options, host=host))
        config = uvicorn.Config(
            application(engine, options.host),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
            server_header=False,
        )
        shown = f"[{host}]" if ":" in host else host
        if not is_local(host) and not options.api_key:
            log.warning("warning: whoever reaches %s can use this server; --api-key asks for a key", shown)
        where = f"http://{shown}:{port}"
        log.info("serving %s at %s (a page to chat; OpenAI's interface at %s/v1); Ctrl-C ends it", engine.name, where, where)
        _ending_first(uvicorn.Server(config), engine).run(sockets=[listening])
    finally:
        listening.close()


def _ending_first(server: uvicorn.Server, engine: Engine) -> uvicorn.Server:
    """``server``, which ends the engine before it waits for connections: answers under way end by themselves, and are told why."""
    shutdown = server.shutdown

    async def ended(sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what a second Ctrl-C cancels is meant to be cancelled
        await asyncio.to_thread(engine.close)
        await shutdown(sockets)

    server.shutdown = ended  # type: ignore[method-assign]
    return server


def _bound(options: ServeOptions) -> socket.socket:
    """A socket at the address, before the minutes that loading may take. Raises OptionError."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(
            f"cannot listen on {options.host}, port {options.port}: {reason.lower()}; give another --port (0 takes a free one)"
        ) from error
    return listening

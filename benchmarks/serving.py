"""`edgepress serve` beside `run`, in turn: wait for the first text, and characters/s after it. Or clients for minutes.

    python benchmarks/serving.py ARTIFACT [--rounds 12 --new-tokens 96 --threads 2]
    python benchmarks/serving.py ARTIFACT --soak 10 [--clients 8]

The second sends requests for so many minutes and tells how many were answered as `run` answers, the server's memory at the
beginning and at the end, and what its metrics counted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.report.stats import ratio
from edgepress.pipeline.runtime.chat import Conversation

PROMPTS = (Path(__file__).parents[1] / "models/prompts.txt").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, help="minutes")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    flags = ["--port", "0", "--threads", str(options.threads), "--parallel", "2", "--queue", "64"]
    command = [sys.executable, "-m", "edgepress.pipeline.cli", "serve", str(options.artifact), *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        port = int(server.stderr.readline().split("127.0.0.1:")[1].split()[0])
        if options.soak:
            soak(options, server, port)
        else:
            compare(options, port)
    finally:
        server.terminate()
        server.wait()


def compare(options: argparse.Namespace, port: int) -> None:
    """First text and tokens/s, paired by prompt. A prompt is new to both, but for what the template puts before it."""
    talk = Conversation(options.artifact, RunOptions(chat=True, max_new_tokens=options.new_tokens, threads=options.threads))
    first: dict[str, list[float]] = {"run": [], "serve": []}
    rate: dict[str, list[float]] = {"run": [], "serve": []}
    for number, prompt in enumerate(PROMPTS[: options.rounds]):
        for side in ("run", "serve") if number % 2 else ("serve", "run"):
            begun, times, sizes = time.perf_counter(), [], []
            for piece in run(talk, prompt) if side == "run" else served(port, prompt, options.new_tokens):
                times.append(time.perf_counter())
                sizes.append(len(piece))
            first[side].append(times[0] - begun)
            rate[side].append(sum(sizes[1:]) / max(times[-1] - times[0], 1e-9))
    for name, samples in (("first text, seconds", first), ("characters/s", rate)):
        found = ratio(samples["serve"], samples["run"])
        means = ", ".join(f"{side} {sum(values) / len(values):.4g}" for side, values in samples.items())
        print(f"{name}: {means}; serve / run {found.value:.3f} ({found.low:.3f} to {found.high:.3f})")


def run(talk: Conversation, prompt: str) -> Iterator[str]:
    talk.forget()
    yield from talk.answer(prompt)


def served(port: int, prompt: str, limit: int) -> Iterator[str]:
    """Pieces of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        while line := response.readline():
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if text := choice["delta"].get("content"):
                    yield text
    finally:
        connection.close()


def soak(options: argparse.Namespace, server: subprocess.Popen, port: int) -> None:
    """Many clients for minutes."""
    limit, prompts = 48, PROMPTS[:12]
    talk = Conversation(options.artifact, RunOptions(chat=True, max_new_tokens=limit, threads=options.threads))
    wanted = {prompt: "".join(run(talk, prompt)) for prompt in prompts}
    del talk
    end, counts, lock = time.monotonic() + 60 * options.soak, {"right": 0, "left": 0, "wrong": 0, "failed": 0}, threading.Lock()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            prompt, leaves, text, result = chance.choice(prompts), chance.random() < 0.25, "", "right"
            try:
                for piece in served(port, prompt, limit):
                    text += piece
                    if leaves and len(text) > 20:
                        break
                right = wanted[prompt].startswith(text) if leaves else text == wanted[prompt]
                result = "wrong" if not right else "left" if leaves else "right"
            except Exception as error:
                result = "failed"
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            with lock:
                counts[result] += 1

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(options.clients)]
    for thread in threads:
        thread.start()
    time.sleep(20)  # until the caches are full
    sizes = [resident(server.pid)]
    while time.monotonic() < end:
        time.sleep(5)
        sizes.append(resident(server.pid))
    for thread in threads:
        thread.join()
    sizes.append(resident(server.pid))
    print(f"{counts}; resident memory {sizes[0] / 1e6:.1f} -> {sizes[-1] / 1e6:.1f} MB, at most {max(sizes) / 1e6:.1f}")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    print("\n".join(line for line in connection.getresponse().read().decode().splitlines() if "_total{" in line))


def resident(pid: int) -> int:
    """Bytes, on Linux."""
    return 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])


if __name__ == "__main__":
    main()

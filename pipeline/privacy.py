"""Nothing that edgepress runs reports to anybody: importing this switches off what libraries would send.

Since 1.29 onnxruntime's wheels for Linux keep a device id in the user's cache folder and send Microsoft an event for each session,
with names and hashes of the model (onnxruntime#27379), unless the environment says no before it is loaded. What the user has set
stays.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

"""Runs ingests in forks of a process that has imported everything: an injected fault costs 0.2 s instead of 3.

One JSON object a line in, {"arguments": [...], "fault": "kill:7", "count": PATH}; one out, {"code": -9, "stderr": ""}.
The workers' tasks are done in the fork itself; what real workers do is shown by the tests that start the real command.
"""

import contextlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import pandas  # noqa: F401  (pyarrow looks for it, at half a second)
from PIL import Image

import ingest.assemble
import ingest.encode
import ingest.report
import ingest.run
import ingest.tokenizer
from ingest.__main__ import main

Image.init()


class Inline:
    """A pool of none."""

    def map_unordered(self, function, tasks):
        return map(function, tasks)


@contextlib.contextmanager
def open_pool(*_):
    yield Inline()


def run(command: dict, stderr: int) -> int:
    """In the fork: the exit code of the ingest."""
    os.setsid()
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"SHARDCLIP_FAULT": command["fault"], "SHARDCLIP_COUNT": command["count"]}
    runpy.run_path(str(Path(__file__).with_name("sitecustomize.py")))
    ingest.run.open_pool = open_pool
    try:
        main(command["arguments"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            code = run(json.loads(line), stderr.fileno())
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        sys.stdout.write(json.dumps({"code": code, "stderr": stderr.read().decode()}) + "\n")
        sys.stdout.flush()

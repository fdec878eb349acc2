"""Runs training in forks of a process that has imported everything: a start costs 0.3 s instead of 5.

One JSON object a line in, one out.

    {"start": ["--shards", ...], "ranks": 2, "fault": "kill:7", "count": PATH}  ->  {"pids": [12, 13]}
    {"wait": [12, 13]}                                       ->  {"codes": [-9, 1], "stderr": ["", ""]}

`fault` counts what rank 0 does to its files (pieces of a checkpoint, fsync, rename, link, unlink) and its validation
batches. `clock: true` has the clock jump by a day with every look at it. `raise: [1, 5]` raises on rank 1 in step 5,
`sleep: [1, 5, 2.5]` sleeps there (rank -1: on all; step -1: in every step), `hold: [1, 5, PATH]` waits there until the
file is there, and `slow_save: PATH` has every save wait for it.
"""

import gc
import itertools
import json
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pandas  # noqa: F401  (pyarrow looks for it)
import torch.utils.tensorboard  # noqa: F401

import train.checkpoint
import train.loop
import train.objective
from pipeline.kernels import compiled_functions
from train.main import main

running: dict[int, object] = {}
compiled_functions()
train.loop.draw_curves = lambda *_: None  # a second a run
gc.collect()
gc.freeze()  # a collection in a fork would copy all pages


def fault(command: dict) -> None:
    """In the fork: break what the command wants broken."""
    if command.get("fault") or command.get("count"):
        os.environ |= {"SHARDCLIP_FAULT": command.get("fault", ""), "SHARDCLIP_COUNT": command["count"]}
        counted = runpy.run_path(str(Path(__file__).with_name("sitecustomize.py")))["_counted"]
        os.link, os.unlink = counted(os.link), counted(os.unlink)
        train.checkpoint._Hashing.write = counted(train.checkpoint._Hashing.write)
        train.objective._embed_batch = counted(train.objective._embed_batch)
    if command.get("slow_save"):
        write = train.checkpoint.write_stream
        train.checkpoint.write_stream = lambda *what: (until(command["slow_save"]), write(*what))
    if command.get("clock"):
        now, jumps = time.time, itertools.cycle((0, 86400, -86400))
        time.time = lambda: now() + next(jumps)
        time.time_ns = lambda: int(time.time() * 1e9)


def until(path: str) -> None:
    """Return when a file is there."""
    while not os.path.exists(path):
        time.sleep(0.01)


def trouble(command: dict, rank: int) -> None:
    """In the fork: break a step."""
    kind = next((each for each in ("raise", "hold") if each in command), "sleep")
    which, when, *more = command.get(kind, (None, None))
    if which not in (rank, -1):
        return
    digest, steps = train.loop.digest_batch, itertools.count(1)

    def broken(*arguments):
        if next(steps) == when or when == -1:
            if kind == "raise":
                raise RuntimeError("made to fail")
            (until if kind == "hold" else time.sleep)(*more)
        return digest(*arguments)

    train.loop.digest_batch = broken


def run(command: dict, rank: int, port: int, stderr: int) -> int:
    """In the fork: the exit code of one rank."""
    os.setsid()
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if command["ranks"] > 1:
        size = {"WORLD_SIZE": command["ranks"], "LOCAL_WORLD_SIZE": command["ranks"], "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in size.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0:
        fault(command)
    trouble(command, rank)
    try:
        main(command["start"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(command: dict) -> list[int]:
    """The processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(command["ranks"]):
        stderr = tempfile.TemporaryFile()
        pid = os.fork()
        if not pid:
            code = run(command, rank, port, stderr.fileno())
            sys.stderr.flush()
            os._exit(code)
        running[pid] = stderr
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> dict:
    """What became of them."""
    codes, texts = [], []
    for pid in pids:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stderr = running.pop(pid)
        stderr.seek(0)
        texts.append(stderr.read().decode())
        stderr.close()
    return {"codes": codes, "stderr": texts}


for line in sys.stdin:
    wanted = json.loads(line)
    answer = {"pids": start(wanted)} if "start" in wanted else wait(wanted["wait"])
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()

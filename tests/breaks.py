#!/usr/bin/env python3
"""Breaks each promise on purpose and shows which test notices.

Every break is a few lines behind `cfg(pubsub_break = "name")`, which the build scripts of the
server and the client set from the environment variable PUBSUB_BREAK. For each one this builds,
runs the tests that guard the promise, and prints the first that went red and after how long.

    tests/breaks.py                 all of them
    tests/breaks.py NAME...         some of them
    tests/breaks.py --list          their names

Exits with 1 if a break survives. Builds go to target/breaks, so that no broken binary is left
where another run could find it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = ["-p", "pubsub-server", "--lib"]
CLIENT = ["-p", "pubsub-client", "--lib"]
END_TO_END = ["-p", "pubsub-tests", "--test", "it"]

# What is broken, the promise, and the tests that guard it, quickest first.
BREAKS = {
    "commit_without_sync": ("P1", [SERVER + ["storage"]]),
    "blob_without_sync": ("P1", [SERVER + ["storage"]]),
    "ack_before_commit": ("P1", [SERVER + ["storage"]]),
    "notify_before_commit": ("P1", [SERVER + ["storage"]]),
    "dedup_in_second_transaction": ("P3", [SERVER + ["storage"]]),
    "fenced_frame_consumes_sequence": ("P3", [SERVER + ["storage"], END_TO_END + ["fenced"]]),
    "retry_mints_new_identity": ("P3", [CLIENT + ["publisher"], END_TO_END + ["retry"]]),
    "schema_before_identity": ("P13", [SERVER + ["what_is_new"], END_TO_END + ["whatever"]]),
    "head_before_identity": ("P12", [SERVER + ["atomic"], END_TO_END + ["batches"]]),
    "batch_in_part": ("P12", [SERVER + ["atomic"], END_TO_END + ["batches"]]),
    "filter_is_ignored": ("Filters", [END_TO_END + ["filters"]]),
    "replay_out_of_order": ("P4", [CLIENT + ["publisher"], END_TO_END + ["replayed"]]),
    "resume_by_last_received": ("P2", [CLIENT + ["subscriber"], END_TO_END + ["nack"]]),
    "resume_off_by_one": ("P2", [CLIENT + ["subscriber"], END_TO_END + ["delivery"]]),
    "acks_dropped_at_reconnect": ("P5", [CLIENT + ["subscriber"], END_TO_END + ["acks"]]),
    "outbox_mints_new_keys": ("P3", [END_TO_END + ["outbox"]]),
    "outbox_removes_before_the_answer": ("P1", [END_TO_END + ["outbox"]]),
    "outbox_forgets_what_it_sent": ("P9", [END_TO_END + ["outbox"]]),
    "events_missed_in_silence": ("P7", [SERVER + ["broker::events"]]),
    "events_resume_in_silence": ("P7", [END_TO_END + ["events::a_lost"]]),
    "key_goes_on_after_a_failure": ("P4", [END_TO_END + ["order"], SERVER + ["delivery"]]),
    "letter_in_its_own_commit": ("P2", [END_TO_END + ["step_of_a_move"]]),
    "seek_topic_by_topic": ("P2", [END_TO_END + ["step_of_a_seek"]]),
    "inbox_is_not_asked": ("P5", [CLIENT + ["inbox"], END_TO_END + ["inbox"]]),
}

FAILED = re.compile(r"^test (\S+) \.\.\. FAILED", re.M)


def cargo(name, arguments):
    environment = dict(
        os.environ,
        PUBSUB_BREAK=name,
        CARGO_TARGET_DIR=str(ROOT / "target/breaks"),
        # What a broken build fails on is no regression to remember.
        PROPTEST_DISABLE_FAILURE_PERSISTENCE="1",
    )
    command = ["cargo", "test", "--quiet", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def first_failure(name, filters):
    """Builds, then runs; answers the test that failed and the seconds that it took."""
    package = filters[: 3 if "--lib" in filters else 4]
    build = cargo(name, [*package, "--no-run"])
    output, _ = build.communicate()
    if build.returncode != 0:
        sys.exit(f"{name}: does not build\n{output}")
    started = time.monotonic()
    command = filters + ["--", "--format", "pretty"]
    run = cargo(name, command)
    lines = []
    for line in run.stdout:
        lines.append(line)
        match = FAILED.match(line)
        if match:
            seconds = time.monotonic() - started
            run.kill()
            run.wait()
            return match.group(1), seconds
    run.wait()
    if run.returncode != 0:
        # A test that takes the whole process down is red as well.
        return f"(the test process died: {''.join(lines[-3:]).strip()})", time.monotonic() - started
    return None


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(BREAKS)
    if "--list" in sys.argv:
        print("\n".join(BREAKS))
        return
    survivors = []
    for name in names:
        promise, attempts = BREAKS[name]
        found = None
        for filters in attempts:
            found = first_failure(name, filters)
            if found:
                break
        if found:
            test, seconds = found
            print(f"{promise}  {name:32} red after {seconds:5.1f} s  {test}", flush=True)
        else:
            survivors.append(name)
            print(f"{promise}  {name:32} SURVIVED", flush=True)
    print(f"{len(names) - len(survivors)} of {len(names)} breaks were noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()

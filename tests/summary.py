#!/usr/bin/env python3
"""Runs the parts of `make test` one after the other, and prints a table of their results at the end.

usage: summary.py PART...      Each PART is a target of the Makefile.

The output of a part is passed through unchanged; the counts are read from it. The first part that fails ends the run:
the exit status is that of the part, after the table. The lines that are counted:

    test result: ok. 12 passed; 0 failed; 1 ignored; ... finished in 3.45s      a test binary of cargo
    test NAME ... ignored, REASON                                               a test that is ignored
    SKIPPED: NAME: REASON                                                       a test or part that cannot run here
    CONFORMANCE: 12 cases passed                                                a run of the conformance suites
    12 passed, 0 failed                                                         the manifest, browser and cluster tests
"""

import os
import re
import subprocess
import sys
import time

# Names of the rows of `make unit`, by the source of their test binary.
BINARIES = {"src/lib.rs": "unit", "src/main.rs": "unit", "tests/it/main.rs": "integration"}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
RUNNING = re.compile(r"^\s*Running (?:unittests )?(\S+\.rs) \(")
RESULT = re.compile(r"^test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored;.* finished in ([\d.]+)s")
IGNORED = re.compile(r"^test (\S+) \.\.\. ignored(?:, (.*))?$")
SKIPPED = re.compile(r"SKIPPED: (.+?): (.*)$")
CONFORMANCE = re.compile(r"CONFORMANCE: (\d+) cases passed$")
COUNTS = re.compile(r"^(\d+) passed, (\d+) failed$")


class Row:
    def __init__(self):
        self.passed = self.failed = 0
        self.reasons = {}       # why a test was skipped, by its name
        self.seconds = None

    @property
    def skipped(self):
        return len(self.reasons)


class Part:
    """A target of the Makefile, with a row for each of its suites."""

    def __init__(self, name):
        self.name, self.rows, self.current, self.results = name, {}, name, 0
        self.is_cargo_test = False

    def row(self, name=None):
        return self.rows.setdefault(name or self.current, Row())

    def read(self, line):
        line = ESCAPES.sub("", line).rstrip()
        if match := RUNNING.match(line):
            self.current, self.is_cargo_test = BINARIES.get(match[1], match[1]), True
            self.row()
        elif line.lstrip().startswith("Doc-tests "):
            self.current = "doc tests"
        elif match := RESULT.match(line):
            row = self.row()
            row.passed += int(match[1])
            row.failed += int(match[2])
            row.seconds = (row.seconds or 0) + float(match[4])
            self.results += 1
        elif match := COUNTS.match(line):
            row = self.row()
            row.passed, row.failed = row.passed + int(match[1]), row.failed + int(match[2])
            self.results += 1
        elif match := IGNORED.match(line):
            self.row().reasons[match[1]] = match[2] or "ignored"
        elif match := SKIPPED.search(line):
            row = self.row()
            # Cargo counts a test that returns early as passed.
            if self.is_cargo_test and match[1] not in row.reasons:
                row.passed -= 1
            row.reasons[match[1]] = match[2]
        elif match := CONFORMANCE.search(line):
            self.row("conformance").passed += int(match[1])

    def finish(self, status, seconds):
        if not self.results and not self.rows:
            # The part has no counts of its own: it is one check.
            row = self.row()
            row.passed, row.failed = (0, 1) if status else (1, 0)
        elif status and not any(row.failed for row in self.rows.values()):
            # The part ended without counting its failure: it was not built, or it crashed.
            self.row().failed += 1
        measured = sum(row.seconds or 0 for row in self.rows.values())
        if measured == 0:
            next(iter(self.rows.values())).seconds = seconds
        elif seconds - measured >= 1:
            self.rows = {f"{self.name} (build)": Row(), **self.rows}
            next(iter(self.rows.values())).seconds = seconds - measured


def run(part):
    """Runs a part, and returns its exit status."""
    start = time.monotonic()
    command = [os.environ.get("MAKE") or "make", "--no-print-directory", part.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    rest = b""
    try:
        while data := os.read(process.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                part.read(line.decode(errors="replace"))
        part.read(rest.decode(errors="replace"))
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        status = 130
    status = status if status >= 0 else 128 - status
    part.finish(status, time.monotonic() - start)
    return status


def table(parts, not_run):
    rows = [(name, row) for part in parts for name, row in part.rows.items()]
    total = Row()
    for _, row in rows:
        total.passed, total.failed = total.passed + row.passed, total.failed + row.failed
        total.seconds = (total.seconds or 0) + (row.seconds or 0)
    count = sum(row.skipped for _, row in rows)
    width = max(len(name) for name in [*(name for name, _ in rows), *not_run, "suite", "total"])

    def line(name, *cells):
        return f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells)

    def seconds(row):
        return "" if row.seconds is None else f"{row.seconds:.1f}"

    lines = ["", line("suite", "passed", "failed", "skipped", "seconds"), "-" * (width + 40)]
    lines += [line(name, row.passed, row.failed, row.skipped, seconds(row)) for name, row in rows]
    lines += [line(name, "", "", "not run", "") for name in not_run]
    lines += ["-" * (width + 40), line("total", total.passed, total.failed, count, seconds(total))]
    lines += [f"skipped: {test}: {reason}" for _, row in rows for test, reason in row.reasons.items()]
    return "\n".join(lines)


def main():
    names = sys.argv[1:]
    if not names:
        sys.exit(__doc__)
    parts = []
    for name in names:
        parts.append(Part(name))
        status = run(parts[-1])
        if status:
            break
    print(table(parts, names[len(parts):]), flush=True)
    if status:
        print(f"FAILED: {parts[-1].name}, exit status {status}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Converts seed files to inputs for libFuzzer, and an input to a line of a seed file.

    seeds.py expand seeds/NAME.txt DIRECTORY
    seeds.py line FILE
"""

import pathlib
import re
import sys

ESCAPES = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}


def unescape(line: str) -> bytes:
    parts = re.split(r"(\\x[0-9a-fA-F]{2}|\\[rnt\\])", line)
    read = lambda part: bytes.fromhex(part[2:]) if part[1] == "x" else ESCAPES[part[1]]
    return b"".join(read(part) if part.startswith("\\") else part.encode() for part in parts)


def escape(data: bytes) -> str:
    named = {value[0]: "\\" + name for name, value in ESCAPES.items()}
    plain = lambda byte: chr(byte) if 32 <= byte < 127 and byte != ord("#") else f"\\x{byte:02x}"
    return "".join(named.get(byte) or plain(byte) for byte in data)


def main() -> None:
    match sys.argv[1:]:
        case ["expand", seeds, directory]:
            lines = pathlib.Path(seeds).read_text().split("\n")[:-1]
            inputs = [unescape(line) for line in lines if not line.startswith("#")]
            for number, data in enumerate(inputs):
                pathlib.Path(directory, f"seed-{number:03}").write_bytes(data)
        case ["line", file]:
            print(escape(pathlib.Path(file).read_bytes()))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

"""Read the rows of a JSONL file, one JSON object per line. All data files of users are read here."""

from __future__ import annotations

import json

from configs.config import UserError
from runtime.files import json_error

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before UTF-8 text


def parse_jsonl(content: bytes, name: str) -> list[tuple[str, dict]]:
    """A list of (place, row), one per line of the bytes `content`. Blank lines are skipped. A place is 'NAME line 12'.

    Only "\\n" ends a line, because texts may contain other separators, such as U+2028.
    Raises UserError that names the place for a line that is not UTF-8, not JSON, or not an object.
    """
    rows = []
    for number, line in enumerate(content.removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({json_error(error)}); it takes one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be an object with keys, not {line[:60].decode(errors='replace')!r}")
        rows.append((where, row))
    return rows

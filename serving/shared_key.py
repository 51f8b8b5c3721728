"""The key of the prediction ids of a cluster, kept with its lake: who makes or checks ids of that lake finds the same.

In a folder it is a file that only its owner may read. An object store has no such thing: there it is a table of one
row, and whoever may read the lake may read it; it tells an honest mistake from a real id (`serving.ids`), no more.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from noria.lake import Lake
from noria.records import Window
from noria.schema import ARROW, Column, Schema
from serving.ids import read_key

PLACE = ".cluster"
KEY = Schema((Column("key", "string"),), event_time="made", target="-")
EVER = Window(datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))


def shared_key(lake: str, own: Path) -> bytes:
    """The key of a lake, made at the first call; what the folder `own` holds becomes it where there is none yet.

    Raises what the lake raises when it does not answer.
    """
    if "://" not in lake:
        return read_key(Path(lake) / PLACE)
    kept = Lake(lake, PLACE, KEY)
    rows = kept.records(EVER)
    if not len(rows):
        row = {"key": [read_key(own).hex()], "made": pa.array([datetime.now(UTC)], ARROW["timestamp"])}
        kept.append("records", pa.table(row), batch=("key", 0))  # once, also when two do it at the same time
        rows = kept.records(EVER)
    return bytes.fromhex(rows.column("key")[0].as_py())

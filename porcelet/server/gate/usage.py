"""What was used: requests and tokens per key, model and UTC day."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from sqlalchemy import BigInteger, Column, Connection, String, Table, func, insert, select, update

from porcelet.server.store import metadata


@dataclass(frozen=True)
class Amounts:
    """Tokens of answers are counted in `generated_tokens`, those of their reasoning once more by themselves."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    reasoning_tokens: int = 0


_usage = Table(
    "usage",
    metadata,
    Column("day", String, primary_key=True),
    Column("key", String, primary_key=True),  # empty for whoever needed none
    Column("model", String, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in Amounts.__dataclass_fields__),
)


@dataclass(frozen=True)
class Day:
    """One row: `date` is a UTC day, as 2026-02-01."""

    date: str
    key: str
    model: str
    amounts: Amounts


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def add(connection: Connection, day: str, key: str, model: str, amounts: Amounts) -> None:
    """Count it to a day."""
    more = asdict(amounts)
    row = (_usage.c.day == day) & (_usage.c.key == key) & (_usage.c.model == model)
    sums = {name: _usage.c[name] + amount for name, amount in more.items()}
    if connection.execute(update(_usage).where(row).values(sums)).rowcount == 0:
        connection.execute(insert(_usage).values(day=day, key=key, model=model, **more))


def days(connection: Connection, key: str | None = None, since: str = "") -> list[Day]:
    """By day, then key and model; of one key or of all."""
    rows = select(_usage).where(_usage.c.day >= since).order_by(_usage.c.day, _usage.c.key, _usage.c.model)
    if key is not None:
        rows = rows.where(_usage.c.key == key)
    return [
        Day(row.day, row.key, row.model, Amounts(*(row._mapping[name] for name in Amounts.__dataclass_fields__)))
        for row in connection.execute(rows)
    ]


def tokens(connection: Connection) -> dict[str, int]:
    """All tokens of prompts and answers that each key has ever used."""
    total = func.sum(_usage.c.prompt_tokens + _usage.c.generated_tokens)
    return {key: int(count) for key, count in connection.execute(select(_usage.c.key, total).group_by(_usage.c.key))}

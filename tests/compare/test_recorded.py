"""The verdict on real runs, good ones and ones made to go wrong (`scripts/verdict_runs.py --keep` recorded them)."""

import gzip
import json
from pathlib import Path

import pytest

from manyhands.compare.verdict import judge
from manyhands.config.load import parse_run

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json.gz"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_the_verdict_is_right(path: Path) -> None:
    told = json.loads(gzip.decompress(path.read_bytes()))
    verdict = judge(told["records"], parse_run(told["run"], path.name))
    found = {(finding.kind, finding.fault) for finding in verdict.findings}
    assert bool(verdict.exit_code()) == told["fault"], verdict.lines()
    assert told["expected"] is None or (told["expected"], told["fault"]) in found, verdict.lines()


def test_enough_is_recorded() -> None:
    told = [json.loads(gzip.decompress(path.read_bytes())) for path in RECORDED]
    kinds = {one["expected"] for one in told if one["expected"]}
    assert len(told) == 18 and len(kinds) == 11 and sum(one["expected"] is None for one in told) == 6
    assert sum(path.stat().st_size for path in RECORDED) < 200_000

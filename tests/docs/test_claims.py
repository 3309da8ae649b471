"""Claims are measured, judged and written as a page."""

import json
from pathlib import Path

import claims
import pytest


def test_claims_are_data_that_their_parts_can_answer():
    statements = [claim.statement for claim in claims.CLAIMS]
    assert len(set(statements)) == len(statements)
    for claim in claims.CLAIMS:
        assert {*claim.needs} <= {*claims.PARTS[claim.part].variants}
        assert claim.region[0] < claim.region[1]


@pytest.mark.slow
def test_memory_is_measured_and_others_are_named_as_missing(tmp_path: Path):
    assert claims.main(["--quick", "--out", str(tmp_path), "memory"]) == 0
    (claim,) = json.loads((tmp_path / "claims.json").read_text("utf-8"))["claims"]
    assert claim["judgement"] == "holds"
    assert 0 < claim["high"] < 1
    page = (tmp_path / "claims.md").read_text("utf-8")
    assert "| **holds** |" in page
    assert "Not measured: MQA costs quality;" in page


@pytest.mark.slow
def test_a_sweep_is_measured_once_and_joins_the_page(tmp_path: Path):
    found = [claims.main(["--quick", "--out", str(tmp_path), part]) for part in ("memory", "feed_forwards")]
    before = json.loads((tmp_path / "claims.json").read_text("utf-8"))["claims"]
    found.append(claims.main(["--quick", "--out", str(tmp_path), "feed_forwards"]))  # the runs are there
    assert found == [0, 0, 0]
    assert json.loads((tmp_path / "claims.json").read_text("utf-8"))["claims"] == before
    relu, memory = before
    assert (relu["statement"], memory["statement"]) == ("SwiGLU beats ReLU", claims.CLAIMS[-1].statement)
    assert relu["low"] <= relu["mean"] <= relu["high"]
    assert (relu["runs"], relu["tokens"]) == (4, 4 * 4 * 8 * 64)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        claims.main(["norm"])
    assert "PART=norm is none of attention, norms" in capsys.readouterr().err

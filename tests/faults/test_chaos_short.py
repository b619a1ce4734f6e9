"""Ten random faults on a real Kafka of one node, in little time; `make chaos` is the long form, on three nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos import chaos
from kraft import kraft_missing

if TYPE_CHECKING:
    from pathlib import Path

SEED, FAULTS, RATE = 11, 10, 60


@pytest.mark.kafka
@pytest.mark.timeout(240)
async def test_ten_random_faults_leave_every_number_as_the_raw_topic_says(tmp_path: Path) -> None:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    played = await chaos.run(SEED, FAULTS, nodes=1, rate=RATE, directory=tmp_path, audit=False, say=False)
    code = chaos.report(played, SEED)
    verdict = played.outcome.verdict
    assert verdict is not None
    assert verdict.differences == []
    assert verdict.truth.calls > RATE, "nothing was emitted: then nothing was proved"
    assert verdict.halts > 0, "no cap was crossed: then no command was compared"
    assert sum(played.outcome.faults.values()) == FAULTS
    assert code == 0

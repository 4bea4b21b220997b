"""What a server takes of the machine by itself."""

import pytest

from manyhands.engine.engine import Engine
from manyhands.serve import load

from ..engine.conftest import build


@pytest.mark.parametrize(("free", "blocks"), [(1e12, 12), (4 * 32 * 5.4, 5), (1.0, 1), (None, None)])
def test_the_cache_has_room_for_all_contexts_or_a_quarter_of_what_is_free(free, blocks, monkeypatch):
    model = build(max_position_embeddings=70)  # 3 blocks of 32
    token = Engine(model, keep_routing=True).cache_bytes_per_token
    monkeypatch.setattr(load, "free_memory", lambda: free and free * token)
    found = load.cache_bytes(model, 4)
    if blocks is None:
        assert found is None
        return
    engine = Engine(model, max_sequences=4, cache_bytes=found, keep_routing=True)
    assert engine.scheduler.blocks.num_blocks == blocks

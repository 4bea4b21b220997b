"""Cache policies on a recorded trace: what a byte budget for experts would have hit and read.

from manyhands.simulate import Wants, replay
from manyhands.store.policies import Lfu

wants = Wants.of(Trace.open("trace"))
tally = replay(Lfu(3_000_000_000, wants.record_bytes), wants)
"""

from manyhands.simulate.belady import Belady, told
from manyhands.simulate.replay import Result, Tally, replay
from manyhands.simulate.wants import Wants

__all__ = ["Belady", "Result", "Tally", "Wants", "replay", "told"]

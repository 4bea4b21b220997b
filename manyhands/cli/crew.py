"""`torchrun … -m manyhands generate|serve`: processes that hold one model's experts together.

The first does what the verb says. The others run experts for it, print nothing, and end when it has ended.
"""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands.moe.crew import Crew


def with_crew(lead: "Callable[[Crew | None], None]") -> None:
    """Call `lead`, which loads a model with those that hold its experts too; in a process that is alone, with None.

    A process that dies ends all of them, with one line.
    """
    from manyhands.parallel.started import started_together

    if not started_together():
        lead(None)
        return

    from manyhands.checkpoint.own import own_experts
    from manyhands.moe.crew import Crew
    from manyhands.parallel.group import Group, joined, patient

    with joined("cpu") as together:
        ranks = patient(together)
        if not isinstance(ranks, Group):
            lead(None)
            return
        crew = Crew(ranks)
        if crew.leads:
            try:
                lead(crew)
            except (KeyboardInterrupt, SystemExit):
                ranks.first_to_fail(130)
                raise
            crew.close()
        else:
            for number in (signal.SIGINT, signal.SIGTERM):  # the first decides when to end
                signal.signal(number, signal.SIG_IGN)
            crew.follow(own_experts(crew))

"""Which sections answer a question, in the order in which they are read.

What only some questions need is imported where it is used: starting up is most of the planner's time.
"""

from typing import TYPE_CHECKING

from manyhands.plan.report import model
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.figure import Section
from manyhands.plan.subject import Subject

if TYPE_CHECKING:
    from manyhands.plan.machine import Machine


def build_sections(subject: Subject, ask: Ask) -> list[Section]:
    """Everything that can be said about `subject` with what `ask` gives."""
    sections = [model.parameters(subject)]
    if subject.sizes is None:
        if subject.pairs is not None:
            from manyhands.plan.report.pairs import pairs

            sections.append(pairs(subject.pairs))
        sections.append(model.memory(subject, ask))
    else:
        sections += [model.compute(subject, ask), model.memory(subject, ask)]
        sections += [model.cache(subject, ask), model.reading(subject, ask)]
    if subject.prices:
        from manyhands.plan.report.charged import charged

        sections.append(charged(subject))
    if ask.machine is not None and subject.sizes is not None:
        sections += _on_machine(subject, ask, ask.machine)
    if ask.memory is not None:
        from manyhands.plan.report.budget import budget

        sections.append(budget(subject, ask, ask.memory))
    if ask.tokens is not None:
        from manyhands.plan.report.machine import training

        sections.append(training(subject, ask))
    if ask.train_memory:
        from manyhands.plan.report.training_memory import training_memory

        sections.append(training_memory(subject, ask))
    if ask.scale and ask.machine is not None:
        from manyhands.plan.report.scale import parallel
        from manyhands.plan.report.scale_out import scale_out

        sections.append(parallel(subject, ask, ask.machine))
        if (further := scale_out(subject, ask, ask.machine)) is not None:
            sections.append(further)
    if ask.flops is not None:
        from manyhands.plan.report.scale import scaling

        sections.append(scaling(ask.flops))
    return sections


def _on_machine(subject: Subject, ask: Ask, machine: "Machine") -> list[Section]:
    from manyhands.plan.report.machine import money, offload, speed

    assert subject.sizes is not None
    sections = [speed(subject, ask, machine)]
    from manyhands.plan.report.expected import expected

    if (likely := expected(subject, ask, machine, ask.recorded_here)) is not None:
        sections.append(likely)
    if ask.speculate is not None:
        from manyhands.plan.report.speculation import speculation

        sections.append(speculation(subject, ask, machine, ask.speculate))
    fits = ask.need(subject).fits(machine)
    if subject.sizes.num_experts and ask.disk_rate and not (fits and machine.devices > 1):
        sections.append(offload(subject, ask, machine))
    if ask.price is not None:
        sections.append(money(subject, ask, machine, ask.price))
    if ask.price is not None and ask.mixed:
        from manyhands.plan.report.blended import mixed

        sections.append(mixed(subject, ask, machine, ask.price))
    return sections

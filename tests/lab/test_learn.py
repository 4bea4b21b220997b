"""A small model learns what it is asked, the same way each time."""

from itertools import repeat
from pathlib import Path

import torch

from manyhands.config import ModelConfig, MoEConfig, RouterConfig, RunConfig
from manyhands.config.attention import AttentionConfig
from manyhands.config.run import OptimConfig, ScheduleConfig, TrainConfig
from manyhands.lab.job import Job
from manyhands.lab.learn import Asked, ask, learn

IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
TARGETS = torch.tensor([[6, 2, 7], [6, 5, 1]])
MASK = torch.tensor([[False, True, True], [False, True, True]])
RUN = RunConfig(
    model=ModelConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        max_position_embeddings=3,
        attention=AttentionConfig(num_attention_heads=2, head_dim=8, qk_norm="head"),
        moe=MoEConfig(moe_intermediate_size=16, router=RouterConfig(num_experts=4, num_experts_per_tok=1)),
    ),
    optim=OptimConfig(name="adamw", lr=0.02, weight_decay=0.0),
    schedule=ScheduleConfig(warmup_steps=1),
    train=TrainConfig(max_steps=40, sequence_length=3),
)


def test_it_learns_what_is_asked_and_nothing_else(tmp_path: Path) -> None:
    asked = Asked(IDS, TARGETS, MASK)
    job = Job(quick=True, seeds=(0,), scratch=tmp_path)
    learned = learn(job, RUN, repeat(asked), "arm")
    answers = ask(learned.model, asked)
    assert torch.equal(answers.right, MASK)
    assert answers.nats < 0.1 < learned.progress.losses[0]
    assert list(learned.progress.steps) == list(range(1, 41)) and len(job.clocks) == 1
    other = Asked(IDS, torch.where(MASK, TARGETS, 0), MASK)
    assert ask(learned.model, other).nats == answers.nats
    again = learn(job, RUN, repeat(other), "arm")
    assert again.progress.losses == learned.progress.losses

"""A model of manyhands under transformers' Trainer: a module gives the loss, a callback moves the bias."""

import sys
import tempfile

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import manyhands as mh

BALANCE = mh.BalanceConfig(aux_loss_coef=0.01, aux_scope="micro", bias_update_rate=0.01)
HALF, VOCAB = 4, 16


class WithLoss(torch.nn.Module):
    """Stands before the model: the Trainer wants the loss, and writes into a `model.config`, where ours is frozen."""

    def __init__(self, model):
        super().__init__()
        self.model, self.counts = model, {}

    def forward(self, input_ids):
        """Cross entropy of the next token, and the balance terms; the Trainer averages over accumulated batches."""
        out = self.model(input_ids[:, :-1])
        language = F.cross_entropy(out.logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())
        balancing, _ = mh.balance_objective(out.routings, BALANCE, num_sequences=len(input_ids))
        if self.training:
            for layer, routing in out.routings.items():
                self.counts[layer] = self.counts.get(layer, 0) + routing.expert_counts()
        return {"loss": language + balancing, "logits": out.logits}


class MoveBias(TrainerCallback):
    """After each optimiser step. On several processes the counts are to be summed over them first."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Every layer's, from all tokens of the step."""
        for layer, counts in model.counts.items():
            router = model.model.sparse_layers()[layer].router
            mh.update_bias(router.e_score_correction_bias, counts, rate=BALANCE.bias_update_rate)
        model.counts = {}


def main(directory, steps=60):
    """Learn to copy, save, and load what was saved."""
    torch.manual_seed(0)
    router = mh.RouterConfig(num_experts=8, num_experts_per_tok=2, score="sigmoid", bias=True)
    model = mh.Decoder(
        mh.ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            max_position_embeddings=32,
            moe=mh.MoEConfig(router=router, moe_intermediate_size=16),
        )
    )
    mh.init_weights(model, 0)
    half = torch.randint(VOCAB, (1024, HALF))
    rows = [{"input_ids": row} for row in torch.cat([half, half], 1)]
    args = TrainingArguments(
        directory,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=steps,
    )
    trainer = Trainer(WithLoss(model), args, train_dataset=rows, callbacks=[MoveBias()])
    loss = trainer.train().training_loss
    mh.save(model, f"{directory}/model")  # not save_model: this is what mh.load and transformers read
    again = mh.load_model(f"{directory}/model")
    ids = torch.stack([row["input_ids"] for row in rows[:8]])
    with torch.no_grad():
        different = (again(ids).logits - model.eval()(ids).logits).abs().max()
        end = F.cross_entropy(again(ids[:, :-1]).logits[:, HALF - 1 :].flatten(0, 1), ids[:, HALF:].flatten())
    bias = max(float(moe.router.e_score_correction_bias.abs().max()) for moe in again.sparse_layers().values())
    print(
        f"mean loss {loss:.3f}  copying at the end {end:.3f}  largest bias {bias:.3f}  reloaded differs {different:.1e}"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)

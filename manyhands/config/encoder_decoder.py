"""An encoder-decoder: T5 (arXiv 1910.10683) and its sparse descendants Switch (2101.03961) and ST-MoE (2202.08906)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from manyhands.config.activation import Activation
from manyhands.config.model import AnyModelConfig, register
from manyhands.config.moe import MoEConfig
from manyhands.config.numbers import Count, Layers, Size
from manyhands.config.router import MIXES_TOKENS, RouterConfig
from manyhands.errors import ConfigError


@register
class EncoderDecoderConfig(AnyModelConfig):
    """RMSNorm, relative position biases, an attention of its own over the encoder's output in every decoder layer.

    Layers are numbered through: the encoder's from 0, the decoder's after them.
    """

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    """The encoder's."""
    num_decoder_layers: Layers
    intermediate_size: Size
    """Width of every feed-forward network, and of every expert."""
    hidden_act: Activation = "relu"
    num_attention_heads: Size
    head_dim: Size
    """The heads' width times their number need not be hidden_size (T5-11B: 16,384 against 1,024)."""
    relative_attention_num_buckets: Annotated[int, Field(strict=True, ge=4, le=1 << 16)] = 32
    """Of the one table of relative positions that the encoder has, and of the decoder's."""
    relative_attention_max_distance: Size = 128
    """Positions at least as far apart share the last bucket."""
    rms_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    initializer_factor: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Multiplies the standard deviation of every fresh weight; √0.1 = 0.316 is Switch's tenth of the variance."""
    tie_word_embeddings: bool = True
    """The head is the embedding, and the states are multiplied by hidden_size^-0.5 before it."""
    share_embeddings: bool = True
    """Encoder and decoder look tokens up in one table. transformers' untied Switch has two."""
    router: RouterConfig | None = None
    """None: dense."""
    num_sparse_encoder_layers: Count = 0
    """How many are asked for: layer i is sparse where i % step = 1, step = layers // this (all, where step = 1). Of 12
    layers and 5 that is every second one, so 6: `sparse_encoder_layers` has them."""
    num_sparse_decoder_layers: Count = 0
    extra_encoder_networks: Count = 0
    """Dense feed-forward networks beyond one per layer: ST-MoE follows each sparse one with a dense one."""
    extra_decoder_networks: Count = 0

    @property
    def sparse_encoder_layers(self) -> list[int]:
        """The numbers of the encoder's sparse layers."""
        return _sparse(self.num_hidden_layers, self.num_sparse_encoder_layers)

    @property
    def sparse_decoder_layers(self) -> list[int]:
        """The numbers of the decoder's sparse layers, counted from its own first layer."""
        return _sparse(self.num_decoder_layers, self.num_sparse_decoder_layers)

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of all sparse layers: the decoder's follow on the encoder's."""
        return self.sparse_encoder_layers + [self.num_hidden_layers + layer for layer in self.sparse_decoder_layers]

    @property
    def moe(self) -> MoEConfig | None:
        """The sparse layers as the layer takes them; which they are is said by `sparse_layers`."""
        if self.router is None:
            return None
        return MoEConfig(router=self.router, moe_intermediate_size=self.intermediate_size, hidden_act=self.hidden_act)

    @model_validator(mode="after")
    def _consistent(self) -> "EncoderDecoderConfig":
        for name, sparse, layers in (
            ("num_sparse_encoder_layers", self.num_sparse_encoder_layers, self.num_hidden_layers),
            ("num_sparse_decoder_layers", self.num_sparse_decoder_layers, self.num_decoder_layers),
        ):
            if sparse > layers:
                raise ValueError(f"{name} = {sparse} exceeds {layers} layers")
        if self.router is not None and self.router.select == "soft":
            raise ValueError(MIXES_TOKENS)
        if (self.router is None) != (not self.num_sparse_encoder_layers + self.num_sparse_decoder_layers):
            raise ValueError("router and the numbers of sparse layers go together")
        for name, extra, sparse_layers in (
            ("extra_encoder_networks", self.extra_encoder_networks, self.sparse_encoder_layers),
            ("extra_decoder_networks", self.extra_decoder_networks, self.sparse_decoder_layers),
        ):
            if extra not in (0, len(sparse_layers)):
                raise ValueError(
                    f"{name} = {extra}: one follows each of the {len(sparse_layers)} sparse layers, or none"
                )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance = {self.relative_attention_max_distance} must exceed half of "
                f"relative_attention_num_buckets = {self.relative_attention_num_buckets}"
            )
        if self.tie_word_embeddings and not self.share_embeddings:
            raise ValueError("tie_word_embeddings needs share_embeddings: the head can be one table only")
        return self


def as_encoder_decoder(config: Any) -> EncoderDecoderConfig:
    """`config`, if it describes an encoder-decoder. Raises `ConfigError` for another kind."""
    if isinstance(config, EncoderDecoderConfig):
        return config
    raise ConfigError(f"kind = {getattr(config, 'kind', config)!r} is not 'encoder_decoder'")


def _sparse(layers: int, asked: int) -> list[int]:
    """transformers' rule (`models/switch_transformers`), which the released checkpoints follow."""
    step = layers // asked if asked else 0
    return [layer for layer in range(layers) if step and (step == 1 or layer % step == 1)]

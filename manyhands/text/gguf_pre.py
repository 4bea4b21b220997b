"""How a byte-level vocabulary splits text before it merges, by the names of `tokenizer.ggml.pre` in GGUF.

Several patterns are applied one after another, each to the pieces that the ones before it left. The patterns are those
of the publishers' tokenizer.json, which llama.cpp's `src/llama-vocab.cpp` quotes; where it has another spelling of the
same (no `(?i:…)`), the publisher's is here.
"""

from manyhands.text.tiktoken_model import KIMI_PIECES

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
LLAMA3 = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",)
QWEN2 = (rf"{_WORDS}|\p{{N}}|{_OTHERS}",)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
GPT4O = (_CASED % (_ENDINGS + "?", _ENDINGS + "?") + r"|\p{N}{1,3}|" + _SLASHED,)
TEKKEN = (_CASED % ("", "") + r"|\p{N}|" + _SLASHED,)
DIGITS_GPT2 = (r"\p{N}", *GPT2)
DEEPSEEK_LLM = (
    "[\\r\\n]",
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-"
    "\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-"
    "\U0001e943]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    "\\p{N}+",
)
DEEPSEEK_CODER = (
    "[\\r\\n]",
    "\\s?\\p{L}+",
    "\\s?\\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    "\\p{N}",
)
DEEPSEEK_V3 = (
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?["
    "\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)

PRE: dict[str, tuple[str, ...]] = {
    name: patterns
    for patterns, names in (
        (GPT2, ("gpt-2", "olmo", "phi-2", "mpt")),
        (LLAMA3, ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
        (QWEN2, ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2")),
        (GPT4O, ("gpt-4o", "llama4", "minimax-m2")),
        (TEKKEN, ("tekken",)),
        (DIGITS_GPT2, ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")),
        (DEEPSEEK_LLM, ("deepseek-llm",)),
        (DEEPSEEK_CODER, ("deepseek-coder",)),
        (DEEPSEEK_V3, ("deepseek-v3", "hunyuan-dense")),
        ((KIMI_PIECES,), ("kimi-k2",)),
    )
    for name in names
}
"""`tokenizer.ggml.pre` -> patterns."""
WHOLE_TOKENS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken", "glm4"})
"""A piece that is a token is one, whatever the merges would make of it."""
STARTED = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""A text begins with the token of `bos_token_id`, if the file does not say (`add_bos_token`)."""

"""Every formula by name, with its source. N: active parameters without the input embedding."""

from manyhands.plan.report.figure import Formula

COUNT = Formula("parameter count", "Σ over tensors of Π shape", "the configuration")
ACTIVE = Formula("active parameters", "total - (E - K)/E·routed experts", "arXiv 2401.04088 §2.1")
FORWARD = Formula("forward FLOPs", "2·N + Σ_layers 2·min(c, window)·H·(d_qk + d_v)", "arXiv 2001.08361 §2.1")
LATENT = Formula("decoding FLOPs, latent cache", "2·N + Σ_layers 2·c·H·(2·R + r)", "arXiv 2405.04434 §2.1.2")
PAIR = Formula(
    "FLOPs of a pair",
    "2·(S·encoder + T·(decoder + head)) + 4·H·d·(L_e·S² + L_d·(T²/2 + T·S)), S tokens in, T out, routers left out",
    "2·weights per token; arXiv 2101.03961, table 9 prints totals, not its formula",
)
PAIR_ROUTERS = Formula("FLOPs of its routers", "2·D·E·(S·L_e + T·L_d), over the sparse layers", "the configuration")
PAIR_TRAINING = Formula("training FLOPs of a pair", "3·(forward + routers)", "arXiv 2001.08361 §2.1")
TRAINING = Formula("training FLOPs", "3·(2·N + attention at the mean context s/2)", "arXiv 2505.09343, table 2")
PREFILL = Formula("prefill FLOPs", "s·(2·body + attention at s/2) + 2·head", "arXiv 2001.08361 §2.1")
DISTINCT = Formula("distinct experts, uniform", "E·(1 - (1 - K/E)^T)", "expected coverage of T independent draws")
LOADED = Formula("distinct experts, recorded load", "mean over layers of Σ_e 1 - (1 - K·share_e)^T", "the load file")
READ = Formula("bytes read per step", "fixed weights + distinct·sparse layers·expert + B·cache(c)", "arXiv 2312.17238")
WEIGHTS = Formula("weight bytes", "Σ_classes parameters·bits/8", "the format of each class of tensor")
WORKING = Formula(
    "working memory",
    "max over blocks of activations + 4·T·D + routings; experts: T·K·max(D + 2·F, 4·F, F + 2·D)",
    "the buffers of this package's engine",
)
CACHE = Formula(
    "cache bytes", "Σ_layers values·bits/8·min(c, window); values = 2·G·d, MLA: R + r", "arXiv 2405.04434, table 1"
)
ROOF = Formula(
    "roofline",
    "max(bytes / bandwidth, FLOP / rate, 2·layers·latency on several devices)",
    "Williams et al., CACM 52(4), 2009",
)
EXPECTED = Formula("expected time of a layer", "bound / a + c", "fitted on measured speeds, docs/planning.md")
ENERGY = Formula("energy of a token", "watts of all devices / (tok/s)", "at the power limit of every device")
GUESSED = Formula(
    "speed when guessing ahead", "accepted·B / (pass over B·(1 + d) tokens + d·draft)", "arXiv 2211.17192 §3.3"
)
PAYS = Formula("accepted tokens from which it pays", "step that guesses / step that does not", "the same speeds")
OFFLOAD = Formula(
    "offloading, nothing overlapped", "(fixed + cache + h·experts)/memory + (1 - h)·experts/disk", "arXiv 2312.17238"
)
OVERLAP = Formula("offloading, all overlapped", "max(all bytes/memory, (1 - h)·experts/disk)", "arXiv 2312.17238")
REST = Formula("all but experts", "process + other weights + caches + working memory", "this package's own engine")
SLOTS = Formula("room for experts", "memory - all but experts", "of all experts: divided by their bytes")
HITS = Formula("hit rate", "h(share of the experts that fits)", "a replayed trace, or the mean of three")
MISSED = Formula("read from disk", "(1 - h)·experts of a step", "arXiv 2312.17238")
RESIDENT = Formula("experts that fit", "(memory - all else) / routed experts", "the hit rate if routing were uniform")
PRICE = Formula("price of a million tokens", "P/h / 3600 / (tok/s) · 10^6", "a machine that is never idle")
BLENDED = Formula(
    "blended price", "(r·((1 - cached)·input + cached·cached input) + output) / (r + 1)", "r tokens in to one out"
)
EVEN = Formula("tokens an hour at break-even", "P/h / blended price·10^6", "the machine's hour paid in tokens")
BUSY = Formula("busy share at break-even", "own blended price / the API's", "idle hours cost as much as busy ones")
TRAIN_TOTAL = Formula("training FLOPs, all tokens", "FLOPs per token · tokens", "arXiv 2505.09343, table 2")
HOURS = Formula("device hours", "FLOP / (rate · utilisation) / 3600", "arXiv 2204.02311, appendix B")
MFU = Formula("utilisation", "FLOP / (rate · hours · 3600)", "arXiv 2204.02311, appendix B")
COST = Formula("cost", "device hours · price", "the price given")
SHARDS = Formula(
    "distinct shards", "R·(1 - C(E - E/R, K)/C(E, K))", "hypergeometric; node limit: arXiv 2412.19437 §2.1.2"
)
ALL_TO_ALL = Formula("all-to-all", "α + T·copies·D·bytes / bandwidth · imbalance", "arXiv 2412.19437 §3.2")
RECORDED = Formula("busiest / mean", "Σ max over devices / Σ mean, mean over layers", "the trace")
EXPERT_TIME = Formula("expert arithmetic", "2·T·(K·expert·imbalance + shared) / rate", "arXiv 2006.16668")
STEP = Formula(
    "step on N devices",
    "arithmetic + busiest device's more + (exchange - hidden) + max(0, gathering + hidden - arithmetic - busiest)",
    "arXiv 2412.19437 §3.2, 2304.11277 §3",
)
EXCHANGE = Formula("exchange of a step", "2·sparse layers·(dispatch + combine)", "arXiv 2006.16668 §3.2")
GATHERED = Formula(
    "gathering", "3·L·log2(members)·α + parameters·(2 + 2 + 4)·(members - 1)/members / bandwidth", "arXiv 2304.11277 §3"
)
STATE = Formula(
    "memory of a device", "16·parameters/N + 2 gathered blocks in bf16", "arXiv 1910.02054 §3.1, moments in float32"
)
LASTING = Formula("memory that lasts", "4·numbers / W", "arXiv 1910.02054 §3.1, all of it in float32")
CAST = Formula("matrices in bfloat16", "2·numbers of the blocks that are held at once", "this package's layout")
KEPT = Formula(
    "activations",
    "T·Σ_layers 2·(4·D + 2·(H + G)·d + K·(2·D + 3·F) + 3·shared) + 4·(D + E + statistics)",
    "what this package's modules keep for the backward pass",
)
RECOMPUTED = Formula("activations, recomputed", "T·(2·D·L + routings) + the largest block", "arXiv 1604.06174 §4.1")
EFFICIENCY = Formula("efficiency", "mean device's arithmetic / step", "the same step")
HOLD = Formula("smallest number of devices", "⌈weights / (memory·(1 - reserve))⌉", "10% of each device kept free")
LAW = Formula(
    "joint scaling law", "min over N of a·Ê^δ·N^(α+γ·lnÊ) + b·Ê^ω·D^(β+ζ·lnÊ) + c with 6·N·D = C", "arXiv 2502.05172"
)
RATIO = Formula("ratio", "A / B", "")

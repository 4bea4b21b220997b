"""Chat templates in the manner of the model families, written for these tests."""

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate: user, assistant, user") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=true, system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endif %}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

HARMONY = """\
{#- In the manner of gpt-oss: macros, a namespace, loop controls, the date. -#}
{%- macro parameter(name, spec, depth=0) -%}
    {{- ' ' * depth }}{{ name }}: {{ spec.type | default('any') -}}
    {%- if spec.enum is defined %} ({{ spec.enum | map('tojson') | join(' | ') }}){% endif -%}
    {%- if spec.properties is mapping %}
        {%- for inner, innerspec in spec.properties.items() %}
            {{- '\\n' + parameter(inner, innerspec, depth + 2) }}
        {%- endfor %}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=none, seen=0) -%}
<|start|>system<|message|>You are {{ model_identity | default("a model") }}.
Current date: {{ strftime_now("%Y-%m-%d") }}
Reasoning: {{ reasoning_effort | default("medium") }}
{% if tools is iterable and tools %}
# Tools
{% for tool in tools %}
{{ parameter(tool.function.name, tool.function.parameters) }}
{% endfor %}
{% endif %}
<|end|>
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- if ns.seen > 40 %}{% break %}{% endif -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {%- set ns.last = message.role -%}
    <|start|>{{ message.role }}<|message|>
    {{- message.content if message.content is string else message.content | tojson }}
    {{- '<|return|>' if message.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}
{%- endfor -%}
{%- if ns.last == 'user' and add_generation_prompt %}<|start|>assistant{% endif -%}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "deepseek": DEEPSEEK, "harmony": HARMONY}
SPECIAL = [
    "<|endoftext|>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|start|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
]
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello"}],
    "with a system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  naïve café ☕ <b>&</b>\n"},
    ],
    "three turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\n2", "tool_calls": None},
        {"role": "user", "content": "'quoted' \"twice\" {{ not a template }} {% nor this %}"},
        {"role": "assistant", "content": "  spaces around  "},
        {"role": "user", "content": "\u2028 नमस्ते 👩‍👩‍👧"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für <einen> Ort",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "unit": {"type": "string", "enum": ["°C", "°F"]}},
            },
        },
    }
]

CHATML_MARKED = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3_MARKED = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
    {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

GEMMA_MARKED = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if role == 'model' %}{% generation %}{{ message['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endgeneration %}
    {%- else %}{{ message['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

DEEPSEEK_MARKED = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ message['content'] }}{% endif %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' }}
        {%- generation %}{{- message['content'] + '<｜end▁of▁sentence｜>' }}{% endgeneration %}
    {%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + content }}
        {%- else %}{{ content }}{% endif %}
    {%- else %}{{ message.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN3_MARKED = (
    QWEN3.replace("{%- if loop.index0 > ns.last %}", "{%- generation %}{%- if loop.index0 > ns.last %}")
    .replace(
        "{%- else %}{{ content }}{% endif %}\n",
        "{%- else %}{{ content }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}\n",
    )
    .replace("{{- '<|im_end|>\\n' }}", "{{- '\\n' if message.role == 'assistant' else '<|im_end|>\\n' }}")
)

MARKED = {
    "chatml": (CHATML_MARKED, "<|im_end|>"),
    "llama3": (LLAMA3_MARKED, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA_MARKED, "<end_of_turn>"),
    "deepseek": (DEEPSEEK_MARKED, "<｜end▁of▁sentence｜>"),
    "qwen3": (QWEN3_MARKED, "<|im_end|>"),
}
"""With `{% generation %}` blocks, and what ends a turn in them."""

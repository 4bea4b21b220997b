"""A chat template for models that were made to continue text: roles in letters, and no token of its own but the end."""

import json

_TEMPLATE = """\
{%- for message in messages %}
{{- '' if loop.first else '\\n\\n' }}{{ '### ' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + END }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### assistant\\n' }}{% endif %}
"""


def plain_template(end: str) -> str:
    """The template where `end` (`<|endoftext|>`) ends an answer."""
    return _TEMPLATE.replace("END", json.dumps(end, ensure_ascii=False))

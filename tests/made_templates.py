"""Chat templates written here, one for each way in which real ones write a turn: the tests of spans run without any other.

Each is a file in a folder laid out like the real ones: `templates/plain/made-*.jinja`, `templates/generation/made-*.jinja`.
"""

from __future__ import annotations

from pathlib import Path

from tests.made_tokenizers import CHATML, DEEPSEEK, MISTRAL, PHI

# Calls and their answers as Hermes and Qwen write them.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning opened by the prompt, and left out of all answers but those behind the last question, as Qwen3 does.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# No token of its own ends an answer: the next header does, as in GLM-4.
NEXT_HEADER = (
    "[gMASK]{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Channels, and another end for the last turn, as gpt-oss writes them.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{{ '<|channel|>final<|message|>' + m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Llama 3: headers in tokens of their own, texts trimmed.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Words for headers, EOS for the end; whoever speaks out of turn is refused.
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{% elif m.role == 'system' and loop.first %}{{ m.content + '\n\n' }}{% else %}{{ raise_exception('unknown role') }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role.title() + ': ' + m.content.strip() + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SAYS_ITS_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN = {
    "made-chatml": CHATML, "made-mistral": MISTRAL, "made-phi": PHI, "made-deepseek": DEEPSEEK, "made-tools": TOOLS,
    "made-thinking": THINKING, "made-next-header": NEXT_HEADER, "made-channels": CHANNELS, "made-headers": HEADERS,
    "made-words": WORDS, "made-no-end": NO_END,
}  # fmt: skip
GENERATION = {"made-says-its-turns": SAYS_ITS_TURNS}


def write_templates(folder: Path) -> None:
    """Write all of them below `folder`/templates."""
    for kind, templates in (("plain", PLAIN), ("generation", GENERATION)):
        place = folder / "templates" / kind
        place.mkdir(parents=True)
        for name, source in templates.items():
            (place / f"{name}.jinja").write_text(source, encoding="utf-8")

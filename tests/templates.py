"""Chat templates built like those of common models, in their essentials, over a vocabulary of bytes and markers."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN2 = """
{%- macro turn(role, text) -%}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{%- endmacro -%}
{%- set ask = messages[0].content if messages[0].role == 'system' else 'You are helpful.' -%}
{%- if tools -%}
{%- set ask = ask + '\\n\\n# Tools\\n<tools>' + (tools | tojson) + '</tools>' -%}
{%- endif -%}
{{ turn('system', ask) }}
{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- else -%}{{ turn(m.role, m.content) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""As Qwen2.5: a system message of its own, results inside a user message."""

QWEN3 = """
{%- set ns = namespace(last_query=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\\n# Tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.content.split('</think>')[0] if '</think>' in m.content else '' -%}
{%- set thought = thought.split('<think>')[-1].strip('\\n') -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last_query and thought -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{{ said + '<|im_end|>\\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""
"""As Qwen3: turns before the last question lose their thoughts."""

LLAMA = """
{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{%- macro head(role) -%}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{%- endmacro -%}
{{ '<|begin_of_text|>' + head('system') + 'Today Date: ' + date_string + '\\n\\n<|eot_id|>' }}
{%- for m in messages -%}
{%- if m.role in ('tool', 'ipython') -%}{{ head('ipython') + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.role == 'user' and loop.first and tools -%}
{{ head('user') + 'Respond with {"name": ..., "parameters": ...}.\\n' + (tools | tojson) + '\\n' }}
{{- m.content + '<|eot_id|>' }}
{%- else -%}{{ head(m.role) + (m.content | trim) + '<|eot_id|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head('assistant') }}{%- endif -%}
"""
"""As Llama 3.1 and later: a date in the system message, results under a role of their own, as JSON."""

CHATML_MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_MARKERS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)


@cache
def byte_tokenizer(template: str) -> Any:
    """One token per byte, and one for each marker of the template's family."""
    markers, end = (LLAMA_MARKERS, "<|eot_id|>") if template == LLAMA else (CHATML_MARKERS, "<|im_end|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token=end,
        additional_special_tokens=[marker for marker in markers if marker != end],
        chat_template=template,
    )

"""Chat templates of the shapes that models use, written for these tests, and tokenizers with their tokens."""
# ruff: noqa: E501  # templates are clearer in whole lines

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny

BEGINNING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# Every turn alike.
CHATML = tiny.CHAT_TEMPLATE

# No generation prompt: the header of an answer is known only from the messages.
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"

# Thinking of earlier turns is dropped, the last answer always has a block of it; tools and their
# results; content that holds its own thinking.
THINKING_DROPPED = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{% set content = m.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {%- if content or not loop.first %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

# The generation prompt opens the thinking.
THINKING_OPENED = THINKING_DROPPED.replace(
    "    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable",
    "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable",
)

# End of text at the very end only.
END_AT_THE_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# A separator instead of a line break, nothing between turns.
SEPARATED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# Channels: thinking in a message of its own, another end for calls and for the last answer.
CHANNELS = """
{{- '<|start|>system<|message|>You are a model.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role in ('system', 'developer') %}
    {%- set instructions = messages[0].content %}{% set messages = messages[1:] %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + (instructions or '') }}
    {%- for tool in tools or [] %}{{- '\\ntype ' + tool.function.name + ' = ' + (tool.function.parameters | tojson) }}{% endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(called='') %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.tool_calls %}
            {%- set call = m.tool_calls[0].function %}
            {%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
            {%- set ns.called = call.name %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson + '<|call|>' }}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {%- if not ns.called %}{{ raise_exception('a tool answers no call') }}{% endif %}
        {{- '<|start|>functions.' + ns.called + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""

# System text in the last user turn, strict order, content after a space, tools before the last question.
SYSTEM_MOVED = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {%- if m == users[-1] and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{% endif %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}{{- call.function | tojson + (', ' if not loop.last else ']' + eos_token) }}{% endfor %}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('only user, assistant, system and tool') }}
    {%- endif %}
{%- endfor %}
"""

# … where questions and answers alternate, and calls are not counted: an answer cannot stand in for calls.
SYSTEM_MOVED_STRICT = """
{%- set ns = namespace(turn=0) %}
{%- for m in messages %}
    {%- if m.role in ('user', 'assistant') and not m.tool_calls %}
        {%- if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
{%- endfor %}""" + SYSTEM_MOVED.lstrip("\n")

# Text before the end of thinking is cut; calls want null content and arguments as text.
THINKING_CUT = """
{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.content is none %}
        {%- for call in m.tool_calls %}
            {{- ('<|Assistant|>' if loop.first else '\\n') + '<|call|>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```<|callend|>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + eos_token }}
    {%- elif m.role == 'tool' %}{{- '<|output|>' + m.content + '<|outputend|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}
"""

# Trimmed content, a date in the header, one call per turn.
TRIMMED = """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|head|>system<|headend|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system }}
{%- if tools is not none and tools is defined %}{{- '\\n' + (tools | tojson) }}{% endif %}
{{- '<|eot|>' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|head|>ipython<|headend|>\\n\\n' + (m.content if m.content is string else m.content | tojson) + '<|eot|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|head|>assistant<|headend|>\\n\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot|>' }}
    {%- else %}
        {{- '<|head|>' + m.role + '<|headend|>\\n\\n' + m.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|headend|>\\n\\n' }}{% endif %}
"""

# The answering role has another name, no system role, strict alternation, lists of parts.
RENAMED = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<|turn|>' + role + '\\n' }}
    {%- if m.content is string %}{{- m.content | trim }}
    {%- else %}{% for part in m.content %}{{- part.text | trim }}{% endfor %}{% endif %}
    {{- '<|turnend|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>model\\n' }}{% endif %}
"""

# Reads parts only: a plain text would be taken for a list of characters.
PARTS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)

# Marks of its own, around the text only.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + BEGINNING
)
# … and around the end as well.
MARKED_WHOLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + BEGINNING
)

# … and around the header too, as SmolLM3's.
MARKED_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + BEGINNING
)

# Plain words instead of tokens.
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% elif m.role == 'system' %}{{ m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Ends of turns that are no tokens of the tokenizer, end of text at the end only.
UNKNOWN_MARKERS = (
    "{% for m in messages %}{{ '<|role-' + m.role + '|>' + m.content + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role-assistant|>' }}{% else %}{{ '<|finis|>' }}{% endif %}"
)

# The generation prompt is written after the last message, so there is none without messages.
PROMPT_IN_LOOP = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

# Turns without an end.
ENDLESS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

MARKERS = (
    "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|im_sep|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|User|>",
    "<|Assistant|>", "<|callend|>", "<|output|>", "<|outputend|>", "<|head|>", "<|headend|>", "<|eot|>",
    "<|turn|>", "<|turnend|>",
)  # fmt: skip
PLAIN_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens that are added, but not special."""


@dataclass(frozen=True)
class Shape:
    """A template, what stands before each answer, and what ends it."""

    template: str
    header: str
    end: str
    last_end: str = ""
    system: bool = True
    alternates: bool = False
    lead: str = ""
    """Written by the answering turn before its content."""
    last_lead: str = ""
    trims: bool = False


IM = ("<|im_start|>assistant\n", "<|im_end|>")
FINAL = "<|channel|>final<|message|>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
SHAPES = {
    "chatml": Shape(CHATML, *IM),
    "no_prompt": Shape(NO_PROMPT, *IM),
    "thinking_dropped": Shape(THINKING_DROPPED, *IM, last_lead=EMPTY_THOUGHT),
    "thinking_opened": Shape(THINKING_OPENED, *IM, last_lead=EMPTY_THOUGHT[len("<think>\n") :]),
    "end_at_the_end": Shape(END_AT_THE_END, "<|assistant|>\n", "<|end|>"),
    "separated": Shape(SEPARATED, "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "channels": Shape(CHANNELS, "<|start|>assistant", "<|end|>", "<|return|>", lead=FINAL),
    "system_moved": Shape(SYSTEM_MOVED, "[/INST]", "</s>", lead=" ", trims=True),
    "thinking_cut": Shape(THINKING_CUT, "<|Assistant|>", "</s>"),
    "trimmed": Shape(TRIMMED, "<|head|>assistant<|headend|>\n\n", "<|eot|>", trims=True),
    "renamed": Shape(
        RENAMED, "<|turn|>model\n", "<|turnend|>", system=False, alternates=True, trims=True
    ),
    "parts_only": Shape(PARTS_ONLY, "<|im_start|>assistant:", "<|im_end|>"),
    "marked": Shape(MARKED, *IM),
    "marked_whole": Shape(MARKED_WHOLE, *IM),
    "marked_header": Shape(MARKED_HEADER, *IM),
    "words": Shape(WORDS, "ASSISTANT:", "</s>", lead=" "),
    "unknown_markers": Shape(UNKNOWN_MARKERS, "<|role-assistant|>", "<|stop|>"),
    "prompt_in_loop": Shape(PROMPT_IN_LOOP, "<|assistant|>\n", "</s>"),
    "endless": Shape(ENDLESS, "<|assistant|>\n", ""),
}


@cache
def tokenizer(template: str, trim_offsets: bool = False) -> Any:
    """Return a byte-level BPE with all markers, `<s>` and `</s>` for beginning and end of text."""
    found = tiny.bpe_tokenizer(template, trim_offsets)
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    found.add_tokens(list(MARKERS), special_tokens=True)
    found.add_tokens(list(PLAIN_MARKERS))
    return found

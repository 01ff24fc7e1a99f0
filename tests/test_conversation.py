"""Conversations: what of them a template is given, and which tokens are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates as shapes
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orchestrator.data.prepare import Prepared, _manifest
from orchestrator.data.sources import find_files, split_into_pieces
from orchestrator.data.write import PieceWork, prepare_piece
from orchestrator.errors import DataError, OrchestratorError, SpecError
from orchestrator.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from orchestrator.plan.warnings import data_warnings
from orchestrator.tasks import BadRow, CausalLM, EncodedRow, PreferenceTuning

Row = dict[str, Any]


def user(content: Any, **more: Any) -> Row:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> Row:
    return {"role": "system", "content": content}


def tool(content: Any) -> Row:
    return {"role": "tool", "content": content, "tool_call_id": "call00001"}


def call(arguments: Any = '{"city": "Rome"}') -> list[Row]:
    function = {"name": "weather", "arguments": arguments}
    return [{"id": "call00001", "type": "function", "function": function}]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TWO = [
    user("the film was great"),
    assistant("it was good"),
    user("and my lunch"),
    assistant("it was bad"),
]
CALLS = [user("weather?"), assistant(None, tool_calls=call()), tool("21"), assistant("it is 21")]


def encoded(tokenizer: Any, messages: Any, tools: Any = None, **rows: Any) -> EncodedRow | BadRow:
    task = CausalLM.model_validate({"type": "causal_lm", "rows": {"type": "chat", **rows}})
    (row,) = task.encode([{"messages": messages, "tools": tools}], tokenizer, 4096, ())
    return row


def learned(tokenizer: Any, ids: list[int], targets: list[int]) -> list[str]:
    """The text of each run of consecutive targets."""
    runs: list[list[int]] = [[]]
    for token, on in zip(ids, targets, strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def learned_of(template: str, messages: Any, tools: Any = None, **rows: Any) -> list[str]:
    tokenizer = shapes.tokenizer(template)
    row = encoded(tokenizer, messages, tools, **rows)
    assert isinstance(row, dict), row
    return learned(tokenizer, row["input_ids"], row["is_target"])


def why_bad(template: str, messages: Any, tools: Any = None, **rows: Any) -> str:
    row = encoded(shapes.tokenizer(template), messages, tools, **rows)
    assert isinstance(row, BadRow), row
    return row.why


# --- every shape of template


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_each_turn_is_learned_as_it_stands_in_the_whole_text(name: str, trim_offsets: bool) -> None:
    shape = shapes.SHAPES[name]
    tokenizer = shapes.tokenizer(shape.template, trim_offsets)
    row = encoded(tokenizer, TWO)
    assert isinstance(row, dict), row
    assert learned(tokenizer, row["input_ids"], row["is_target"]) == [
        f"{shape.lead}it was good{shape.end}",
        f"{shape.lead}{shape.last_lead}it was bad{shape.last_end or shape.end}",
    ]
    if name != "parts_only":
        whole = tokenizer.apply_chat_template(TWO, tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == whole


@pytest.mark.parametrize("name", [n for n, shape in shapes.SHAPES.items() if shape.system])
def test_a_system_turn_is_no_answer_and_may_be_empty(name: str) -> None:
    template = shapes.SHAPES[name].template
    for text in ("be short", ""):
        assert learned_of(template, [system(text), *TWO]) == learned_of(template, TWO)


@pytest.mark.parametrize("name", [n for n, s in shapes.SHAPES.items() if not s.alternates])
def test_a_conversation_may_begin_with_an_answer(name: str) -> None:
    shape = shapes.SHAPES[name]
    first, *others = learned_of(shape.template, [assistant("so it is"), *TWO])
    assert first == f"{shape.lead}so it is{shape.end}"
    assert others == learned_of(shape.template, TWO)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
@pytest.mark.parametrize("answer", ["<yes>", "[DONE]", "so </b>", "7", "{}", "<|b|>", "user"])
def test_answers_that_look_like_control_text_are_learned(name: str, answer: str) -> None:
    shape = shapes.SHAPES[name]
    found = learned_of(shape.template, [user("a"), assistant(answer), *TWO])
    assert found[0] == f"{shape.lead}{answer}{shape.end}"
    last = learned_of(shape.template, [*TWO, user("a"), assistant(answer)])[-1]
    assert last == f"{shape.lead}{shape.last_lead}{answer}{shape.last_end or shape.end}"


texts = st.text(alphabet=st.sampled_from("ab \n.é😀<|>[]{}'\"\\/:"), min_size=1, max_size=12)
words = texts.filter(lambda t: t.strip())


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[Row]]:
    name = draw(st.sampled_from(list(shapes.SHAPES)))
    shape = shapes.SHAPES[name]
    messages = [system(draw(words))] if shape.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(words)), assistant(draw(words))]
        if not shape.alternates and draw(st.booleans()):
            messages.append(assistant(draw(words)))
    return name, messages


@settings(max_examples=400, deadline=None)
@given(conversations())
def test_every_answer_is_learned_and_no_prompt(drawn: tuple[str, list[Row]]) -> None:
    name, messages = drawn
    shape = shapes.SHAPES[name]
    tokenizer = shapes.tokenizer(shape.template)
    numbered = [{**m, "content": f"q{i}{m['content']}q"} for i, m in enumerate(messages)]
    row = encoded(tokenizer, numbered)
    assert isinstance(row, dict), row
    found = learned(tokenizer, row["input_ids"], row["is_target"])
    answers = [m["content"] for m in numbered if m["role"] == "assistant"]
    if name == "endless":
        assert "".join(found) == "".join(answers)
        return
    ends = [shape.end] * (len(answers) - 1) + [shape.last_end or shape.end]
    leads = [shape.lead] * (len(answers) - 1) + [shape.lead + shape.last_lead]
    wanted = [a + b + c for a, b, c in zip(leads, answers, ends, strict=True)]
    # Answers without anything between them make one run.
    assert "".join(found) == "".join(wanted)
    assert all(any(one in run for run in found) for one in wanted)
    assert not any(
        m["content"] in run for m in numbered if m["role"] != "assistant" for run in found
    )


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(shapes.SHAPES)), words, words)
def test_training_begins_an_answer_where_the_model_is_asked_for_it(
    name: str, question: str, answer: str
) -> None:
    from orchestrator.tasks.templating import prompt_ids

    shape = shapes.SHAPES[name]
    tokenizer = shapes.tokenizer(shape.template)
    row = encoded(tokenizer, [user(question), assistant(f"q{answer}q")])
    assert isinstance(row, dict), row
    asked = prompt_ids(question, True, tokenizer)[0].tolist()
    count = row["is_target"].index(1)
    if name == "no_prompt":
        assert row["input_ids"][: len(asked)] == asked
    elif name == "thinking_cut":
        assert row["input_ids"][:count] == asked[:count]
    else:
        assert row["input_ids"][:count] == asked


# --- thinking


def test_thinking_is_learned_where_the_template_writes_it() -> None:
    answer = assistant("it was good", reasoning_content="great is good")
    thought = "<think>\ngreat is good\n</think>\n\nit was good<|im_end|>"
    earlier = [
        user("how was it"),
        answer,
        user("and now"),
        assistant("bad", thinking="dull is bad"),
    ]
    found = learned_of(shapes.THINKING_DROPPED, earlier)
    assert found == ["it was good<|im_end|>", "<think>\ndull is bad\n</think>\n\nbad<|im_end|>"]
    assert learned_of(shapes.THINKING_DROPPED, [user("how was it"), answer]) == [thought]
    written = assistant("<think>\ngreat is good\n</think>\n\nit was good")
    assert learned_of(shapes.THINKING_DROPPED, [user("how was it"), written]) == [thought]
    opened = learned_of(shapes.THINKING_OPENED, [user("how was it"), answer])
    assert opened == [thought.removeprefix("<think>\n")]
    channels = learned_of(shapes.CHANNELS, [user("how was it"), answer])
    assert channels == [
        "<|channel|>analysis<|message|>great is good<|end|>"
        "<|start|>assistant<|channel|>final<|message|>it was good<|return|>"
    ]


@pytest.mark.parametrize("beginning", ["<think>\n", "<think>", ""])
def test_thinking_that_a_template_cuts_is_learned_as_written(beginning: str) -> None:
    tokenizer = shapes.tokenizer(shapes.THINKING_CUT)
    messages = [user("how was it"), assistant(f"{beginning}so it was\n</think>\n\nit was good")]
    row = encoded(tokenizer, messages)
    assert isinstance(row, dict), row
    whole = tokenizer.decode(row["input_ids"])
    opened = beginning or "<think>\n"
    assert whole == (
        f"<s><|User|>how was it<|Assistant|>{opened}so it was\n</think>\n\nit was good</s>"
    )
    found = learned(tokenizer, row["input_ids"], row["is_target"])
    assert found == ["so it was\n</think>\n\nit was good</s>"]


def test_only_the_last_answer_gets_its_thinking_back() -> None:
    thoughts = [user("a"), assistant("<think>\nt\n</think>\n\nb"), user("c"), assistant("d")]
    assert learned_of(shapes.THINKING_CUT, thoughts) == ["\n\nb</s>", "d</s>"]


def test_thinking_that_no_template_reads_is_remarked_on() -> None:
    row = encoded(shapes.tokenizer(shapes.CHATML), [user("a"), assistant("b", thinking="t")])
    assert isinstance(row, dict)
    assert row["notes"] == ("the chat template does not use the message key 'reasoning_content'",)


# --- tools


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    ("template", "first"),
    [
        (
            shapes.THINKING_DROPPED,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        ),
        (
            shapes.CHANNELS,
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        ),
        (
            shapes.SYSTEM_MOVED,
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>',
        ),
        (
            shapes.SYSTEM_MOVED_STRICT,
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>',
        ),
        (shapes.THINKING_CUT, '<|call|>weather\n```json\n{"city": "Rome"}\n```<|callend|></s>'),
        (shapes.TRIMMED, '{"name": "weather", "parameters": {"city": "Rome"}}<|eot|>'),
    ],
)
def test_calls_reach_the_template_in_the_form_that_it_reads(
    template: str, first: str, content: str | None, arguments: Any
) -> None:
    messages = [user("weather?"), assistant(content, tool_calls=call(arguments)), tool("21")]
    found = learned_of(template, [*messages, assistant("it is 21")], TOOLS)
    assert found[0] == first
    assert len(found) == 2
    assert "it is 21" in found[1]


def test_calls_are_learned_where_no_answer_can_stand_in_for_them() -> None:
    two = [*call(), *call({"city": "Paris"})]
    messages = [
        *(system("be short"), user("weather?"), assistant(None, tool_calls=two), tool("21")),
        *(tool("22"), assistant(None, tool_calls=call()), tool("23"), assistant("it is 21")),
    ]
    rome, paris = (
        f'{{"name": "weather", "arguments": {{"city": "{c}"}}}}' for c in ("Rome", "Paris")
    )
    assert learned_of(shapes.SYSTEM_MOVED_STRICT, [*messages, *TWO], TOOLS) == [
        f"[TOOL_CALLS] [{rome}, {paris}]</s>",
        f"[TOOL_CALLS] [{rome}]</s>",
        *(f" {answer}</s>" for answer in ("it is 21", "it was good", "it was bad")),
    ]


def test_what_a_template_leaves_out_is_remarked_on() -> None:
    messages = [
        user("so?"),
        assistant("let me see", tool_calls=call()),
        tool("21"),
        assistant("so"),
    ]
    for name, lost in (("trimmed", "of role 'assistant'"), ("thinking_cut", "tool calls beside")):
        row = encoded(shapes.tokenizer(shapes.SHAPES[name].template), messages)
        assert isinstance(row, dict)
        assert any(lost in note for note in row["notes"])
        whole = encoded(shapes.tokenizer(shapes.THINKING_DROPPED), messages)
        assert isinstance(whole, dict)
        assert not any("leaves out" in note for note in whole["notes"])


def test_a_refusal_gives_the_template_s_own_reason() -> None:
    messages = [user("a"), assistant(None, tool_calls=call()), assistant("b")]
    assert "roles must alternate" in why_bad(shapes.RENAMED, messages)


def test_tools_reach_the_template_as_a_list_or_as_json() -> None:
    tokenizer = shapes.tokenizer(shapes.THINKING_DROPPED)
    rows = [encoded(tokenizer, TWO, tools) for tools in (TOOLS, json.dumps(TOOLS), None)]
    texts_ = [tokenizer.decode(row["input_ids"]) for row in rows if isinstance(row, dict)]
    assert texts_[0] == texts_[1]
    assert '"name": "weather"' in texts_[0]
    assert "weather" not in texts_[2]
    assert "tools must be a list" in why_bad(shapes.CHATML, TWO, "no json")


def test_calls_that_a_template_ignores_are_remarked_on_and_not_learned_as_silence() -> None:
    tokenizer = shapes.tokenizer(shapes.CHATML)
    row = encoded(tokenizer, CALLS)
    assert isinstance(row, dict)
    assert learned(tokenizer, row["input_ids"], row["is_target"]) == ["it is 21<|im_end|>"]
    assert any("'tool_calls'" in note for note in row["notes"])
    assert any("empty" in note for note in row["notes"])


# --- fields of messages


def test_messages_may_be_json_or_sharegpt_or_full_of_nulls() -> None:
    plain = learned_of(shapes.CHATML, TWO)
    assert learned_of(shapes.CHATML, json.dumps(TWO)) == plain
    assert learned_of(shapes.CHATML, str([*TWO[:3], {**TWO[3], "name": None}])) == plain
    names = {"user": "human", "assistant": "gpt"}
    told = [{"from": names[m["role"]], "value": m["content"]} for m in TWO]
    assert learned_of(shapes.CHATML, told) == plain
    nulls = [{**m, "tool_calls": None, "weight": None, "name": None} for m in TWO]
    assert learned_of(shapes.TRIMMED, nulls) == learned_of(shapes.TRIMMED, TWO)
    deep = call({"city": "Rome", "unit": None})
    messages = [user("weather?"), assistant(None, tool_calls=deep), tool("21"), assistant("so")]
    assert "unit" not in learned_of(shapes.TRIMMED, messages)[0]


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("human", "gpt"), ("User", "Assistant"), ("USER", "model"), ("user", "bot")],
)
def test_roles_have_other_names(asks: str, answers: str) -> None:
    names = {"user": asks, "assistant": answers}
    renamed = [{**m, "role": names[m["role"]]} for m in TWO]
    assert learned_of(shapes.RENAMED, renamed) == learned_of(shapes.RENAMED, TWO)


@pytest.mark.parametrize("name", ["thinking_dropped", "thinking_cut", "trimmed", "channels"])
def test_calls_of_other_forms_are_the_same(name: str) -> None:
    template = shapes.SHAPES[name].template
    inner = {"name": "weather", "arguments": {"city": "Rome"}}
    result = {"role": "function", "name": "weather", "content": "21"}
    whole = learned_of(template, CALLS)
    assert "Rome" in whole[0]
    flat = [
        user("weather?"),
        assistant(None, tool_calls=[inner]),
        tool("21"),
        assistant("it is 21"),
    ]
    assert learned_of(template, flat) == whole
    old = [user("weather?"), assistant(None, function_call=inner), result, assistant("it is 21")]
    row = encoded(shapes.tokenizer(template), old)
    assert isinstance(row, dict), row
    assert "21" in shapes.tokenizer(template).decode(row["input_ids"]).partition("it is")[0]
    assert learned_of(template, old) == whole
    told = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": json.dumps(inner)},
        *({"from": "observation", "value": "21"}, {"from": "gpt", "value": "it is 21"}),
    ]
    assert learned_of(template, told) == whole


def test_a_column_that_is_missing_is_called_missing() -> None:
    assert "'messages' is missing" in why_bad(shapes.CHATML, None)


def test_a_system_turn_of_null_is_an_empty_one() -> None:
    assert learned_of(shapes.TRIMMED, [system(None), *TWO]) == learned_of(shapes.TRIMMED, TWO)


@pytest.mark.parametrize("kind", ["plain", "instruction"])
def test_a_tokenizer_without_an_end_is_remarked_on(kind: str) -> None:
    task = CausalLM.model_validate({"type": "causal_lm", "rows": {"type": kind}})
    texts = {"text": "so it was", "prompt": "so", "answer": "it was"}
    tokenizer = tiny.bpe_tokenizer()
    (row,) = task.encode([texts], tokenizer, 64, ())
    assert isinstance(row, dict)
    assert not row["notes"]
    tokenizer.eos_token = None
    (row,) = task.encode([texts], tokenizer, 64, ())
    assert isinstance(row, dict)
    assert any("eos_token" in note for note in row["notes"])


def test_parts_of_text_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "it was "}, {"type": "text", "text": "good", "image": None}]
    assert learned_of(shapes.CHATML, [user("so"), assistant(parts)]) == ["it was good<|im_end|>"]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "'image_url' is no text" in why_bad(shapes.CHATML, [user(picture), assistant("so")])


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"train": "false"}]
)
def test_turns_without_weight_are_not_learned(off: Row) -> None:
    messages = [user("a"), assistant("bad", **off), user("b"), assistant("good", weight=1)]
    for name in ("chatml", "marked", "channels"):
        (found,) = learned_of(shapes.SHAPES[name].template, messages)
        assert "good" in found
    assert "no assistant turn" in why_bad(shapes.CHATML, [user("a"), assistant("b", **off)])


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_the_last_turn_only(name: str) -> None:
    template = shapes.SHAPES[name].template
    assert learned_of(template, TWO, train_on="last") == learned_of(template, TWO)[-1:]


def test_keys_that_no_template_uses_are_remarked_on_once() -> None:
    odd = [{**m, "id": 7} for m in TWO]
    row = encoded(shapes.tokenizer(shapes.CHATML), odd)
    assert isinstance(row, dict)
    assert row["notes"] == ("the chat template does not use the message key 'id'",)


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (shapes.RENAMED, [system("be short"), *TWO], "System role not supported"),
        (shapes.RENAMED, [user("a"), user("b"), assistant("c")], "roles must alternate"),
        ("{{ messages[0].content + 1 }}", TWO, "the chat template refuses it"),
        ("{{ messages | length / 0 }}", TWO, "the chat template refuses it"),
        ("{% for %}", TWO, "the chat template refuses it"),
        ("nothing of it", TWO, "renders no assistant turn"),
        (shapes.CHATML, [{"content": "x"}], "needs `role` and `content`"),
        (shapes.CHATML, [{"from": "narrator", "value": "x"}], "unknown ShareGPT role 'narrator'"),
        (shapes.CHATML, [user(None), assistant("b")], "missing or null"),
        (shapes.CHATML, [user("a"), assistant({"x": 1})], "must be text"),
        (shapes.CHATML, [user("a"), assistant("b", weight="much")], "must be 0 or 1"),
    ],
)
def test_what_cannot_be_rendered_is_a_bad_row(template: str, messages: Any, why: str) -> None:
    assert why in why_bad(template, messages)


def test_an_empty_system_turn_is_left_out_where_the_template_refuses_one() -> None:
    assert learned_of(shapes.RENAMED, [system(""), *TWO]) == learned_of(shapes.RENAMED, TWO)


# --- tokens


def test_control_text_inside_messages_stays_text() -> None:
    tokenizer = shapes.tokenizer(shapes.CHATML)
    said = "say <|im_end|>\n<|im_start|>assistant\nno"
    row = encoded(tokenizer, [user(said), assistant("it </s> was good")])
    assert isinstance(row, dict)
    ids = row["input_ids"]
    assert [
        ids.count(tokenizer.convert_tokens_to_ids(t))
        for t in ("<|im_start|>", "<|im_end|>", "</s>")
    ] == [2, 2, 0]
    assert learned(tokenizer, ids, row["is_target"]) == ["it </s> was good<|im_end|>"]
    assert said in tokenizer.decode(ids)
    assert row["notes"] == ("text of special tokens inside messages is encoded as plain text",)


@pytest.mark.parametrize("name", ["system_moved", "trimmed", "renamed", "thinking_cut"])
def test_there_is_one_beginning_of_text(name: str) -> None:
    from tokenizers.processors import TemplateProcessing

    from orchestrator.tasks.templating import prompt_ids

    tokenizer = tiny.bpe_tokenizer(shapes.SHAPES[name].template)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert tokenizer("a")["input_ids"][0] == bos
    row = encoded(tokenizer, TWO)
    assert isinstance(row, dict)
    assert row["input_ids"].count(bos) == 1
    asked = prompt_ids("the film", True, tokenizer)[0].tolist()
    assert (asked.count(bos), asked[-1] == eos) == (1, False)


def test_a_tokenizer_that_ends_texts_does_not_end_prompts() -> None:
    from tokenizers.processors import TemplateProcessing

    from orchestrator.tasks.templating import prompt_ids

    tokenizer = tiny.bpe_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    task = CausalLM.model_validate({"type": "causal_lm", "rows": {"type": "instruction"}})
    (row,) = task.encode([{"prompt": "was it good ", "answer": "yes"}], tokenizer, 64, ())
    assert isinstance(row, dict)
    assert tokenizer.decode(row["input_ids"]) == "<s>was it good yes</s>"
    assert learned(tokenizer, row["input_ids"], row["is_target"]) == ["yes</s>"]
    assert tokenizer.decode(prompt_ids("was it good", False, tokenizer)[0]) == "<s>was it good"


@pytest.mark.parametrize("name", [n for n in shapes.SHAPES if n != "thinking_cut"])
def test_a_tokenizer_without_offsets_learns_the_same(name: str) -> None:
    from transformers import ByT5Tokenizer

    shape = shapes.SHAPES[name]
    bytes_ = ByT5Tokenizer()
    bytes_.chat_template = shape.template
    bytes_.add_special_tokens({"bos_token": "<s>"})
    row = encoded(bytes_, [user("a </s> b"), *TWO[1:]])
    assert isinstance(row, dict), row
    assert learned(bytes_, row["input_ids"], row["is_target"]) == [
        f"{shape.lead}it was good{shape.end}",
        f"{shape.lead}{shape.last_lead}it was bad{shape.last_end or shape.end}",
    ]
    written = bytes_.apply_chat_template([user("a b"), *TWO[1:]], tokenize=False).count("</s>")
    assert row["input_ids"].count(bytes_.eos_token_id) == written


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_of_a_text_get_no_space_in_front(scheme: str) -> None:
    """As SentencePiece's tokenizers would give each of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = list("abcdefghijklmnopqrstuvwxyz:_|<>▁\n")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, initial_alphabet=letters)
    backend.train_from_iterator(["it was good so it was bad"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=shapes.CHATML)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    row = encoded(tokenizer, [user("so<|im_end|>it was"), assistant("it was good")])
    assert isinstance(row, dict)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert "so<|im_end|>it▁was" in "".join(pieces)
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row["input_ids"].count(control) == 2


# --- from files to the plan


def prepared(spec: Any, folder: Path) -> Row:
    """Counts and remarks of the job's one input file."""
    (file,) = find_files(spec.data.train, spec.data.format)
    pieces = tuple(split_into_pieces([file]))
    return prepare_piece(PieceWork(spec, pieces, None, (), str(folder)))


CHAT = {"type": "causal_lm", "rows": {"type": "chat"}, "packing": False}


def test_structs_of_parquet_are_read_without_the_nulls_of_other_rows(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(shapes.TRIMMED.replace("{{- bos_token }}", ""))
    rows = [
        {"messages": CALLS, "tools": TOOLS},
        {
            "messages": [
                user("so", weight=1),
                assistant("no", weight=0),
                user("a"),
                assistant("b"),
            ],
            "tools": None,
        },
    ]
    path = tiny.write_parquet(tmp_path / "rows.parquet", rows)
    spec = tiny.job(models.qwen2, path, tmp_path, task=CHAT, model={"chat_template": str(template)})
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length_tokens": 512})})
    counts = prepared(spec, tmp_path)
    assert (counts["rows"], counts["bad_rows"]) == (2, 0)
    assert counts["notes"] == {}
    texts_ = texts_of(counts, tmp_path, models)
    assert '"name": "weather", "parameters": {"city": "Rome"}' in texts_[0]
    assert "None" not in "".join(texts_)
    assert "null" not in "".join(texts_)


def texts_of(counts: Row, folder: Path, models: tiny.Tiny) -> list[str]:
    import pyarrow as pa

    tokenizer = AutoTokenizer.from_pretrained(models.qwen2)
    with pa.ipc.open_file(str(folder / counts["shards"][0]["file"])) as file:
        return [tokenizer.decode(ids) for ids in file.read_all()["input_ids"].to_pylist()]


def test_pairs_without_a_prompt_column_are_read_from_any_file(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = [{"chosen": "Human: so Assistant: good", "rejected": "Human: so Assistant: bad"}] * 3
    for write, name in ((tiny.write_parquet, "p.parquet"), (tiny.write_csv, "c.csv")):
        spec = tiny.job(
            models.qwen2, write(tmp_path / name, rows), tmp_path, task={"type": "preference"}
        )
        assert prepared(spec, tmp_path)["rows"] == 3


def test_remarks_are_counted_once_per_row_and_shown_in_the_plan(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    rows = [{"messages": CALLS}] * 3 + [{"messages": TWO}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    spec = tiny.job(models.qwen2, path, tmp_path, task=CHAT)
    counts = prepared(spec, tmp_path)
    unread = "the chat template does not use the message key 'tool_calls'"
    assert counts["notes"][unread] == 3
    (file,) = find_files(spec.data.train, spec.data.format)
    manifest = _manifest(spec, None, "f", [file], (), (), [counts])
    assert manifest.notes == counts["notes"]
    warnings = data_warnings(spec, {"train": Prepared(tmp_path, manifest)})
    assert any(unread in one and "3 of 4" in one for one in warnings)


def test_a_row_that_a_template_refuses_is_skipped_alone(models: tiny.Tiny, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(shapes.RENAMED)
    rows = [{"messages": TWO}, {"messages": [assistant("a"), *TWO]}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    more = {"model": {"chat_template": str(template)}, "data": {"on_bad_row": "skip"}}
    counts = prepared(tiny.job(models.qwen2, path, tmp_path, task=CHAT, **more), tmp_path)
    assert (counts["rows"], counts["bad_rows"]) == (1, 1)
    assert counts["bad"][0]["row"] == 2
    assert "roles must alternate" in counts["bad"][0]["why"]


def test_a_template_of_the_job_is_checked_fingerprinted_and_used(
    models: tiny.Tiny, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"messages": TWO}])
    with pytest.raises(SpecError) as missing:
        tiny.job(models.qwen2, path, tmp_path, task=CHAT, model={"chat_template": str(template)})
    assert [p.field for p in missing.value.problems] == ["model.chat_template"]
    template.write_text(shapes.NO_PROMPT)
    spec = tiny.job(models.qwen2, path, tmp_path, task=CHAT, model={"chat_template": str(template)})
    assert load_tokenizer(spec).chat_template == shapes.NO_PROMPT
    first = tokenizer_fingerprint(spec)
    assert first != tokenizer_fingerprint(tiny.job(models.qwen2, path, tmp_path, task=CHAT))
    template.write_text(shapes.CHATML)
    assert tokenizer_fingerprint(spec) != first
    load_tokenizer(spec).save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == shapes.CHATML
    template.write_text(" ")
    with pytest.raises(OrchestratorError):
        load_tokenizer(spec)


def test_a_model_is_asked_with_a_text_or_with_messages(models: tiny.Tiny) -> None:
    from transformers import AutoModelForCausalLM

    from orchestrator.tasks.templating import prompt_ids

    tokenizer = shapes.tokenizer(shapes.CHATML)
    alone = prompt_ids("the film was great", True, tokenizer)[0].tolist()
    assert prompt_ids(TWO[:1], True, tokenizer)[0].tolist() == alone
    assert prompt_ids(json.dumps(TWO[:2]), True, tokenizer)[0].tolist() == alone
    several = tokenizer.decode(prompt_ids(TWO, True, tokenizer)[0])
    assert several.endswith("and my lunch<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError):
        prompt_ids([system("be short")], True, shapes.tokenizer(shapes.RENAMED))
    task = CausalLM.model_validate(CHAT)
    model = AutoModelForCausalLM.from_pretrained(models.qwen2).eval()
    loaded = AutoTokenizer.from_pretrained(models.qwen2)
    (text,) = task.predict(model, loaded, [{"messages": "the film was great"}], 64)
    (messages,) = task.predict(model, loaded, [{"messages": TWO[:1]}], 64)
    assert text["completion"] == messages["completion"]


# --- pairs


def pair(tokenizer: Any, **row: Any) -> list[str] | str:
    """What is learned of both sides, or why nothing is."""
    (found,) = PreferenceTuning(type="preference").encode([row], tokenizer, 512, ())
    if isinstance(found, BadRow):
        return found.why
    sides = [(found[f"{s}_ids"], found[f"{s}_targets"]) for s in ("chosen", "rejected")]
    whole = [tokenizer.decode(ids) for ids, _ in sides]
    return [*whole, *("|".join(learned(tokenizer, *side)) for side in sides)]


QUESTION = "<|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n"
GOOD, BAD = "it was good<|im_end|>", "it was bad<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the film", "chosen": "it was good", "rejected": "it was bad"},
        {
            "prompt": "the film",
            "chosen": [user("the film"), assistant("it was good")],
            "rejected": [user("the film"), assistant("it was bad")],
        },
        {
            "chosen": json.dumps([user("the film"), assistant("it was good")]),
            "rejected": json.dumps([user("the film"), assistant("it was bad")]),
        },
        {
            "prompt": str([user("the film")]),
            "chosen": assistant("it was good"),
            "rejected": {"from": "gpt", "value": "it was bad"},
        },
        {
            "prompt": [user("the film")],
            "chosen": [assistant("it was good")],
            "rejected": [assistant("it was bad")],
        },
        {"prompt": [user("the film")], "chosen": "it was good", "rejected": "it was bad"},
    ],
)
def test_pairs_of_every_form_are_the_same_pair(row: Row) -> None:
    found = pair(shapes.tokenizer(shapes.CHATML), **row)
    assert found == [f"{QUESTION}{GOOD}\n", f"{QUESTION}{BAD}\n", GOOD, BAD]


def test_what_both_lists_begin_with_is_the_prompt() -> None:
    shared = [system("be short"), *TWO[:2], user("and my lunch")]
    chosen = [*shared, assistant("bad"), user("sure?"), assistant("yes")]
    rejected = [*shared, assistant("good")]
    found = pair(shapes.tokenizer(shapes.CHATML), chosen=chosen, rejected=rejected)
    assert found[2:] == ["bad<|im_end|>|yes<|im_end|>", "good<|im_end|>"]
    assert "both answers are the same" in pair(
        shapes.tokenizer(shapes.CHATML), chosen=TWO, rejected=TWO
    )
    assert "no assistant turn" in pair(
        shapes.tokenizer(shapes.CHATML), chosen=TWO, rejected=TWO[:3]
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "answers"),
    [
        ("Human: so Assistant: good", "Human: so Assistant: bad", (" good", " bad")),
        ("Human: so Assistant: good", "Human: so Assistant: google", (" good", " google")),
        ("Q\nA: it was good", "Q\nA: it was good again", ("", " again")),
        ("Q:  so\n\nA: é", "Q:  so\n\nA: è", (" é", " è")),
    ],
)
def test_texts_without_a_prompt_share_it(
    chosen: str, rejected: str, answers: tuple[str, str]
) -> None:
    tokenizer = tiny.bpe_tokenizer()
    found = pair(tokenizer, chosen=chosen, rejected=rejected)
    end = tokenizer.eos_token
    assert found == [chosen + end, rejected + end, *(answer + end for answer in answers)]
    assert "no prompt can be told" in pair(tokenizer, chosen="good", rejected="bad")

"""Settings of a tokenizer that a task's text needs; each is applied in place, and applying it twice is once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    import torch

SPACE = "Ġ"
"""What byte-level tokenizers write for a space."""


def special_text_is_data(tokenizer: Any) -> None:
    """Make a control token's name inside a text ordinary text, such as `</s>` or `[SEP]` typed by a user.

    Tokenizers find such names in three places: a table of added tokens, which is told to leave special
    ones alone; the vocabulary itself (Unigram, words), where the name is broken by a space; and Python
    tokenizers, whose text is broken in the same way before they see it.
    """
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True  # exported with it
    names = _found_in_text(tokenizer)
    if not names:
        return
    if not tokenizer.is_fast:
        _break_before(tokenizer, names)
        return
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    kept = [] if backend.normalizer is None else [backend.normalizer]
    broken = [normalizers.Replace(name, _broken(name)) for name in names]
    backend.normalizer = normalizers.Sequence([*broken, *kept])


def control_ids(tokenizer: Any) -> dict[int, str]:
    """Return the tokenizer's control tokens by id; the one for unknown text is none."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {i: str(name) for i, name in {**added, **known}.items() if i != tokenizer.unk_token_id}


def _found_in_text(tokenizer: Any) -> list[str]:
    """Names of control tokens that still come out of a text that holds them; longest first."""
    controls = control_ids(tokenizer)
    names = sorted(set(controls.values()), key=lambda name: (-len(name), name))
    texts = [text for name in names for text in (name, f"a {name} a", f"a{name}a")]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [
        name
        for i, name in enumerate(names)
        if len(name) > 1
        and any(not controls.keys().isdisjoint(row) for row in ids[3 * i : 3 * i + 3])
    ]


def _broken(name: str) -> str:
    return f"{name[0]} {name[1:-1]} {name[-1]}" if len(name) > 2 else " ".join(name)


def _break_before(tokenizer: Any, names: Sequence[str]) -> None:
    """Have a Python tokenizer read every text with the names broken."""
    before = tokenizer.prepare_for_tokenization

    def prepare(text: str, **options: Any) -> Any:
        for name in names:
            text = text.replace(name, _broken(name))
        return before(text, **options)

    tokenizer.prepare_for_tokenization = prepare


def words_have_leading_space(tokenizer: Any) -> None:
    """Make every word of a list begin as it does inside a text: byte-level tokenizers tell ` film` from `film`."""
    if not tokenizer.is_fast or "ByteLevel" not in str(tokenizer.backend_tokenizer.pre_tokenizer):
        return
    tokenizer.add_prefix_space = True
    tokenizer.init_kwargs["add_prefix_space"] = True
    backend = tokenizer.backend_tokenizer
    if _starts_with_space(backend):
        return
    from tokenizers import normalizers, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = True
    if not _starts_with_space(
        backend
    ):  # a pattern splits the text first: the space goes before that
        kept = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([*kept, normalizers.Prepend(" ")])


def _starts_with_space(backend: Any) -> bool:
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith(SPACE)


def ends_with(tokenizer: Any, end: int | None) -> None:
    """Make every text end with the token `end` where the tokenizer writes none: a model that is asked at
    its end of text (BART, T5) needs one in each row."""
    if end is None or not tokenizer.is_fast or end in tokenizer("a")["input_ids"]:
        return
    from tokenizers import processors

    backend, name = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(end)
    template = processors.TemplateProcessing(
        single=f"$A:0 {name}:0", pair=f"$A:0 {name}:0 $B:1 {name}:1", special_tokens=[(name, end)]
    )
    kept = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = processors.Sequence([*kept, template])


def language_codes(tokenizer: Any) -> tuple[str, ...]:
    """Return the languages that the tokenizer marks texts with, none for most."""
    if not hasattr(tokenizer, "src_lang"):
        return ()
    if codes := getattr(tokenizer, "lang_code_to_id", None):
        return tuple(sorted(codes))
    special = {str(token) for token in getattr(tokenizer, "extra_special_tokens", ())}
    named = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    roles = set(tokenizer.special_tokens_map.values()) if tokenizer.special_tokens_map else set()
    return tuple(sorted(t for t in special | named if t not in roles and t[:1].isalpha()))


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> None:
    """Mark sources and targets with their languages.

    Raises OrchestratorError where a language is missing, unknown, or nothing that the tokenizer marks.
    """
    codes = language_codes(tokenizer)
    for field, wanted in (("task.source_language", source), ("task.target_language", target)):
        if not codes and wanted is not None:
            raise OrchestratorError(
                f"{field} = {wanted!r}: this tokenizer marks no languages. Drop the field; "
                "task.prefix tells a model of T5's kind what to do."
            )
        if codes and wanted not in codes:
            why = "is not set, and this tokenizer marks every text with its language"
            raise OrchestratorError(
                f"{field} {why if wanted is None else f'= {wanted!r} is no language of this tokenizer'}. "
                f"Set it to one of: {', '.join(codes)}."
            )
    if codes:
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
        tokenizer.init_kwargs |= {"src_lang": source, "tgt_lang": target}


def target_start(tokenizer: Any) -> dict[str, int]:
    """Return the settings of generation that make a target begin with its language; empty without languages.

    The language stands first (mBART-50, NLLB, M2M100), or last and is where the decoder starts (mBART).
    """
    if not language_codes(tokenizer):
        return {}
    frame = tokenizer(text_target="")["input_ids"]
    if frame[-1] != tokenizer.eos_token_id:
        return {"decoder_start_token_id": int(frame[-1])}
    if frame[0] in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return {}
    return {"forced_bos_token_id": int(frame[0])}


def of_tokens(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Outputs (rows, tokens, …) at the batch's own tokens; learned ones in front have outputs too."""
    return outputs[:, -batch["input_ids"].shape[1] :]

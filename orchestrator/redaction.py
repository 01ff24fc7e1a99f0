"""Secrets in text: which parts of a text are credentials, and the text without them.

The forms are those that issuers document: prefixes of tokens, parameters of presigned URLs, user information in URLs,
PEM headers. Hashes, revisions and paths have none of them. A reference to a variable (`${TOKEN}`) is no secret.

See docs/decisions/0095-credentials-are-found-by-documented-forms-not-entropy.md.
"""

from __future__ import annotations

import re

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_ID)?$", re.I
)
"""Names of environment variables whose values are secrets."""
SECRET_KEY = re.compile(
    r"(^|[._-])(password|passwd|passphrase|api_?key|(secret|private|access|account)_?(access_?)?key"
    r"|(auth|access|bearer|refresh|session|hub|hf)_?token|client_?secret|credentials?)$",
    re.I,
)
"""Names of fields whose values are secrets. Tokenizers have fields like `pad_token`, which is none."""
REMOVED = "[removed]"

_NO_REFERENCE = r"(?!\$\{\w+\}|\$\w+|<|\*|\[removed\])"
_PARAMETERS = (
    "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "X-Goog-Credential",
    "X-Oss-Signature", "x-cos-security-token", "AWSAccessKeyId", "OSSAccessKeyId", "Signature", "sig", "token",
    "access_token", "auth_token", "private_token", "api_key", "apikey", "auth", "password", "passwd", "pwd", "secret",
    "client_secret",
)  # fmt: skip
_START, _END = r"(?<![A-Za-z0-9_-])", r"(?![A-Za-z0-9])"
_BOTH_CASES = r"(?=[A-Za-z0-9]*[a-z])(?=[A-Za-z0-9]*[A-Z])"

FORMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "a URL with a password in it",
        re.compile(
            rf"(?<=://)[^/\s:@'\"]*:{_NO_REFERENCE}(?P<secret>[^/\s@'\"]+|(?!\d+/)[^\s@'\"]+)(?=@)"
        ),
    ),
    (
        "a URL with a token in it",
        re.compile(rf"(?<=http)s?://(?!git@){_NO_REFERENCE}(?P<secret>[^/\s:@?#'\"]+)(?=@)", re.I),
    ),
    (
        "a presigned URL",
        re.compile(
            rf"://[^\s'\"]*[?&;]((?:{'|'.join(_PARAMETERS)})=)(?P<secret>{_NO_REFERENCE}[^\s&;#'\"]+)",
            re.I,
        ),
    ),
    (
        "a storage key",
        re.compile(
            r"(?:AccountKey|SharedAccessKey|SharedAccessSignature)=(?P<secret>[^\s;'\"]{16,})"
        ),
    ),
    ("a storage key", re.compile(r"(?:^|[?&])sig=(?P<secret>[A-Za-z0-9%+/=]{20,})")),
    (
        "a private key",
        re.compile(
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?P<secret>(?!\[removed\])[\s\S]*?)"
            r"(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)"
        ),
    ),
    (
        "a token",
        re.compile(
            rf"{_START}(?P<secret>"
            rf"hf_{_BOTH_CASES}[A-Za-z0-9]{{30,}}|api_org_{_BOTH_CASES}[A-Za-z0-9]{{30,}}"
            r"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}"
            rf"|sk-(?:proj|svcacct|admin|ant|or)-[A-Za-z0-9_-]{{20,}}|sk-{_BOTH_CASES}[A-Za-z0-9]{{32,}}"
            r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}"
            r"|npm_[A-Za-z0-9]{36}|pypi-AgEI[A-Za-z0-9_-]{20,}|dapi[0-9a-f]{32}|dop_v1_[0-9a-f]{64}"
            r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
            rf"){_END}"
        ),
    ),
    (
        "a bearer token",
        re.compile(
            rf"(?:\bAuthorization\W+(?:Basic|Token)|\bBearer) +(?P<secret>{_NO_REFERENCE}(?=\S*\d)[\w.~+/=-]{{16,}})",
            re.I,
        ),
    ),
    (
        "a secret in an option",
        re.compile(
            r"(?<![\w-])--(?:[a-z]+-)*(?:token|password|passwd|api-?key|secret)(?:=| +)"
            rf"(?P<secret>{_NO_REFERENCE}[^\s'\"-][^\s'\"]*)",
            re.I,
        ),
    ),
)
"""What a text may hold → its form; the group `secret` is what must not be repeated."""


def secret_in(text: str) -> str | None:
    """Return what kind of secret `text` holds, None where there is none."""
    return next((kind for kind, form in FORMS if form.search(text)), None)


def redact(text: str) -> str:
    """Return `text` with every secret replaced by `[removed]`."""
    for _, form in FORMS:
        text = form.sub(_without_secret, text)
    return text


def _without_secret(match: re.Match[str]) -> str:
    start, end = (at - match.start() for at in match.span("secret"))
    return match[0][:start] + REMOVED + match[0][end:]

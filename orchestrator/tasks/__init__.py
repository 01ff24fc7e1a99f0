"""Tasks: variants of a tagged union that know their rows, loss, metrics and predictions.

A new task is one frozen class with the members of `Task`, one more arm in `TaskSpec`, one test.
"""

from typing import Annotated

from pydantic import Field

from orchestrator.tasks.base import BadRow, EncodedRow, Task
from orchestrator.tasks.causal_lm import CausalLM
from orchestrator.tasks.image_classification import ImageClassification
from orchestrator.tasks.multi_label import MultiLabelClassification
from orchestrator.tasks.preference import PreferenceTuning
from orchestrator.tasks.question_answering import QuestionAnswering
from orchestrator.tasks.regression import TextRegression
from orchestrator.tasks.reward_model import RewardModel
from orchestrator.tasks.seq2seq import Seq2Seq
from orchestrator.tasks.speech_recognition import SpeechRecognition
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.tasks.token_classification import TokenClassification

TaskSpec = Annotated[
    TextClassification
    | MultiLabelClassification
    | TextRegression
    | TokenClassification
    | QuestionAnswering
    | Seq2Seq
    | ImageClassification
    | SpeechRecognition
    | CausalLM
    | PreferenceTuning
    | RewardModel,
    Field(discriminator="type"),
]

__all__ = [
    "BadRow",
    "CausalLM",
    "EncodedRow",
    "ImageClassification",
    "MultiLabelClassification",
    "PreferenceTuning",
    "QuestionAnswering",
    "RewardModel",
    "Seq2Seq",
    "SpeechRecognition",
    "Task",
    "TaskSpec",
    "TextClassification",
    "TextRegression",
    "TokenClassification",
]

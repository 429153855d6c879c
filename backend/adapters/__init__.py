"""Which adapter performs a task. A new one is one class and one line here."""

from __future__ import annotations

from backend.adapters.base import Adapter
from backend.adapters.echo import Echo
from backend.adapters.generation import CausalGenerator, Chat
from backend.adapters.images import ImageEditor, ImageGenerator, Inpainter
from backend.adapters.pipelines import MaskFiller, TextClassifier, TokenClassifier
from backend.adapters.question_answering import QuestionAnswerer
from backend.adapters.sentence_transformers import Embedder, Reranker
from backend.adapters.seq2seq import Seq2SeqGenerator, Translator
from backend.adapters.zero_shot import ZeroShotClassifier

ADAPTERS: dict[str, type[Adapter]] = {
    "echo": Echo,
    "text-generation": CausalGenerator,
    "chat": Chat,
    "summarization": Seq2SeqGenerator,
    "translation": Translator,
    "text2text-generation": Seq2SeqGenerator,
    "embeddings": Embedder,
    "rerank": Reranker,
    "text-classification": TextClassifier,
    "zero-shot-classification": ZeroShotClassifier,
    "token-classification": TokenClassifier,
    "question-answering": QuestionAnswerer,
    "fill-mask": MaskFiller,
    "text-to-image": ImageGenerator,
    "image-to-image": ImageEditor,
    "inpainting": Inpainter,
}

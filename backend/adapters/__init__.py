"""Which adapter performs a task. A new one is one class and one line here."""

from __future__ import annotations

from backend.adapters.base import Adapter
from backend.adapters.chat import Chat
from backend.adapters.echo import Echo
from backend.adapters.generation import CausalGenerator
from backend.adapters.generic import GenericPipeline
from backend.adapters.generic_calls import CALLS
from backend.adapters.images import ImageEditor, ImageGenerator, Inpainter
from backend.adapters.pipelines import MaskFiller, TextClassifier, TokenClassifier
from backend.adapters.question_answering import QuestionAnswerer
from backend.adapters.recognition import SpeechRecognizer
from backend.adapters.segmentation import Segmenter
from backend.adapters.sentence_transformers import Embedder, Reranker
from backend.adapters.seq2seq import Seq2SeqGenerator, Translator
from backend.adapters.speech import Composer, Speaker
from backend.adapters.three_d import MeshMaker
from backend.adapters.videos import Animator, VideoGenerator
from backend.adapters.vision import DepthEstimator, ImageClassifier, ObjectDetector
from backend.adapters.vision_chat import PictureChat
from backend.adapters.vision_text import Captioner
from backend.adapters.visual_question import VisualQuestionAnswerer
from backend.adapters.zero_shot import ZeroShotClassifier
from backend.adapters.zero_shot_image import ZeroShotImageClassifier

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
    "text-to-video": VideoGenerator,
    "image-to-video": Animator,
    "text-to-3d": MeshMaker,
    "text-to-speech": Speaker,
    "text-to-audio": Composer,
    "automatic-speech-recognition": SpeechRecognizer,
    "image-classification": ImageClassifier,
    "zero-shot-image-classification": ZeroShotImageClassifier,
    "object-detection": ObjectDetector,
    "image-segmentation": Segmenter,
    "depth-estimation": DepthEstimator,
    "image-to-text": Captioner,
    "image-text-to-text": PictureChat,
    "visual-question-answering": VisualQuestionAnswerer,
    **dict.fromkeys(CALLS, GenericPipeline),
}

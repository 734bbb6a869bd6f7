"""heliostat: published alignment methods for PyTorch Lightning.

Names are imported on first use, so ``import heliostat`` loads neither torch nor Lightning.
"""

from typing import TYPE_CHECKING

from heliostat._lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "WhitenedCSE": "lit_models.whitened_cse",
    "TextDataModule": "datamodules.text",
    "ExportBest": "callbacks.export_best",
    "MetricCurves": "callbacks.metric_curves",
    "StepSeed": "callbacks.step_seed",
    "MetricLearning": "lit_models.multi_similarity",
    "CAFA": "lit_models.cafa",
    "LabelledImageDataModule": "datamodules.labelled_images",
    "RetrievalGallery": "callbacks.retrieval_gallery",
    "SourceStatistics": "callbacks.source_statistics",
    "AdaptationReport": "callbacks.adaptation_report",
    "AlignGuard": "callbacks.align_guard",
    "AlignmentRecovery": "callbacks.alignment_recovery",
    "recover_checkpoint": "recovery",
    "ProCLIP": "lit_models.proclip",
    "CaptionGallery": "callbacks.caption_gallery",
    "ImageTextDataModule": "datamodules.image_text",
    "TextEmbedder": "towers",
    "OpenCLIPTextTower": "towers",
    "OpenCLIPImageTower": "towers",
    "TimmImageTower": "towers",
    "Diffusion": "lit_models.diffusion",
    "UREPA": "lit_models.u_repa",
    "UREPACallback": "callbacks.u_repa",
    "SoftREPA": "lit_models.softrepa",
    "DiffusionDataModule": "datamodules.diffusion",
    "SampleGrid": "callbacks.sample_grid",
    "TextTokenEncoder": "token_encoders",
    "PipelineTextEncoder": "token_encoders",
    "PatchEncoder": "token_encoders",
    "PromptDataModule": "datamodules.prompts",
    "GroupPolicy": "lit_models.group_policy",
    "DYPOGate": "callbacks.dypo_gate",
    "CompletionTable": "callbacks.completion_table",
    "TwoBitEncoder": "lit_models.two_bit",
    "QuantizeFrozen": "callbacks.quantize_frozen",
    "BitsReport": "callbacks.bits_report",
}
__all__ = ["__version__", *_EXPORTS]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from heliostat.callbacks.adaptation_report import AdaptationReport as AdaptationReport
    from heliostat.callbacks.align_guard import AlignGuard as AlignGuard
    from heliostat.callbacks.alignment_recovery import AlignmentRecovery as AlignmentRecovery
    from heliostat.callbacks.bits_report import BitsReport as BitsReport
    from heliostat.callbacks.caption_gallery import CaptionGallery as CaptionGallery
    from heliostat.callbacks.completion_table import CompletionTable as CompletionTable
    from heliostat.callbacks.dypo_gate import DYPOGate as DYPOGate
    from heliostat.callbacks.export_best import ExportBest as ExportBest
    from heliostat.callbacks.metric_curves import MetricCurves as MetricCurves
    from heliostat.callbacks.quantize_frozen import QuantizeFrozen as QuantizeFrozen
    from heliostat.callbacks.retrieval_gallery import RetrievalGallery as RetrievalGallery
    from heliostat.callbacks.sample_grid import SampleGrid as SampleGrid
    from heliostat.callbacks.source_statistics import SourceStatistics as SourceStatistics
    from heliostat.callbacks.step_seed import StepSeed as StepSeed
    from heliostat.callbacks.u_repa import UREPACallback as UREPACallback
    from heliostat.datamodules.diffusion import DiffusionDataModule as DiffusionDataModule
    from heliostat.datamodules.image_text import ImageTextDataModule as ImageTextDataModule
    from heliostat.datamodules.labelled_images import LabelledImageDataModule as LabelledImageDataModule
    from heliostat.datamodules.prompts import PromptDataModule as PromptDataModule
    from heliostat.datamodules.text import TextDataModule as TextDataModule
    from heliostat.lit_models.cafa import CAFA as CAFA
    from heliostat.lit_models.diffusion import Diffusion as Diffusion
    from heliostat.lit_models.group_policy import GroupPolicy as GroupPolicy
    from heliostat.lit_models.multi_similarity import MetricLearning as MetricLearning
    from heliostat.lit_models.proclip import ProCLIP as ProCLIP
    from heliostat.lit_models.softrepa import SoftREPA as SoftREPA
    from heliostat.lit_models.two_bit import TwoBitEncoder as TwoBitEncoder
    from heliostat.lit_models.u_repa import UREPA as UREPA
    from heliostat.lit_models.whitened_cse import WhitenedCSE as WhitenedCSE
    from heliostat.recovery import recover_checkpoint as recover_checkpoint
    from heliostat.token_encoders import PatchEncoder as PatchEncoder
    from heliostat.token_encoders import PipelineTextEncoder as PipelineTextEncoder
    from heliostat.token_encoders import TextTokenEncoder as TextTokenEncoder
    from heliostat.towers import OpenCLIPImageTower as OpenCLIPImageTower
    from heliostat.towers import OpenCLIPTextTower as OpenCLIPTextTower
    from heliostat.towers import TextEmbedder as TextEmbedder
    from heliostat.towers import TimmImageTower as TimmImageTower

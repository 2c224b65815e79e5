"""Keep a model as data, and hand it to other runtimes: artifacts, safetensors, torch.export, ONNX, OpenVINO."""

from lightning_opt.export.artifact import artifact_folder, load, save_artifact, verify_artifact
from lightning_opt.export.compare import Difference, compare
from lightning_opt.export.cpu import multiplies_int8_exactly
from lightning_opt.export.exporter import FORMATS, deployable, export, written_files
from lightning_opt.export.fused import fused_layers
from lightning_opt.export.manifest import add_to_manifest
from lightning_opt.export.onnx import OnnxRunner, write_onnx
from lightning_opt.export.onnx_checks import check_onnx, check_openvino
from lightning_opt.export.openvino import OpenVinoRunner, write_openvino
from lightning_opt.export.precision import precision_of
from lightning_opt.export.program import export_program
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.export.safetensors import read_safetensors, write_safetensors
from lightning_opt.export.timing import LatencyPlan
from lightning_opt.export.torch_export import TorchExportRunner, write_torch_export
from lightning_opt.export.trust import build_trusted, declared_models

__all__ = [
    "FORMATS",
    "Difference",
    "EagerRunner",
    "LatencyPlan",
    "OnnxRunner",
    "OpenVinoRunner",
    "Runner",
    "TorchExportRunner",
    "add_to_manifest",
    "artifact_folder",
    "build_trusted",
    "check_onnx",
    "check_openvino",
    "compare",
    "declared_models",
    "deployable",
    "export",
    "export_program",
    "fused_layers",
    "load",
    "multiplies_int8_exactly",
    "precision_of",
    "read_safetensors",
    "save_artifact",
    "verify_artifact",
    "write_onnx",
    "write_openvino",
    "write_safetensors",
    "write_torch_export",
    "written_files",
]

"""Packaging of fastory. kernels/ and export/ lie at the top level and install as fastory.kernels and fastory.export."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

packages = [
    *find_packages(include=["fastory", "fastory.*"]),
    "fastory.kernels",
    *(f"fastory.kernels.{name}" for name in find_packages("kernels")),
    "fastory.export",
    *(f"fastory.export.{name}" for name in find_packages("export")),
]

here = Path(__file__).parent
# Releases that are known not to work are left out by name; the file has the reasons, and `fastory doctor` prints them.
excluded = runpy.run_path(str(here / "fastory" / "packages.py"))["excluded"]

# Lower bounds are the oldest releases that work together, tried by .ci/run; constraints.txt has what the suite passed with.
install_requires = [
    "torch>=2.11",  # tensors, attention, the custom operators; no upper cap
    "diffusers>=0.42",  # UNets, VAEs, schedulers and the reading of checkpoints
    "transformers>=5.17" + excluded("transformers"),  # CLIP text and image encoders, tokenizers
    "accelerate>=1.0",  # diffusers and transformers load weights without a second copy through it; training's loop
    "safetensors>=0.8",  # the only weight format that is read
    "peft>=0.21",  # LoRA files on the UNet and the text encoder
    "numpy>=1.26",  # pictures as arrays
    "pillow>=10.1",  # PNG and WebP, resizing, the drawn world
    "pydantic>=2.7",  # the story file's schema
    "PyYAML>=6",  # story files, with line numbers
    "typer>=0.15",  # the command line
    "rich>=13",  # progress, tables
    "tqdm>=4.64",  # the bar of a program's drawing, in notebooks too
    "jinja2>=3.1",  # the storybook page
    "filelock>=3.13",  # one process per run folder, released by the system on a kill
    "psutil>=5.9",  # free memory, for the micro-batch
    "fsspec>=2023.5",  # batches whose --output is a URL; PyTorch and the hub's client bring it anyway
    "packaging>=23",  # versions of other packages, for `fastory doctor` and the LoRA loader
    # The kernels. Triton publishes wheels for Linux only; elsewhere the SDPA path runs.
    "triton>=3.6; platform_system == 'Linux'",
]

extras_require = {
    # one more peer and one more choice for FASTORY_KERNELS; it pins its own torch
    "xformers": ["xformers"],
    # fastory tune: losses and validation pictures, as files that any TensorBoard shows
    "tune": ["tensorboard>=2.16"],
    # fastory export: the format, torch's exporter, and the runtime that each graph is compared on
    "onnx": ["onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.24.1"],
    # fastory export --trt: builds engines for the GPU of this machine
    "tensorrt": ["tensorrt>=11"],
    # fastory export --trt --rtx: builds engines without a GPU; the libraries are in the wheel
    "rtx": [
        "tensorrt-rtx-cu13-libs==1.7.1.116; platform_system == 'Linux'",
        "tensorrt-rtx-cu13-bindings==1.7.1.116; platform_system == 'Linux'",
    ],
    # fastory serve: routes with an OpenAPI document, and the server under them
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    # fastory eval --metrics fid,kid,afid: the distances; --metrics cids: its matching
    "eval": ["torchmetrics>=1.5", "scipy>=1.13"],
    # the papers' features of FID, KID and aFID; it brings torchvision, which has to be of this torch
    "inception": ["torchmetrics>=1.5", "scipy>=1.13", "torch-fidelity>=0.3"],
    # fastory compare: plots on its page; the tables have the same figures
    "plots": ["matplotlib>=3.9"],
    # fastory batch --ray: stories over the machines of a cluster; 240 MB, and so no part of what tests install
    "ray": ["ray>=2.60"],
    # fastory batch --output s3://.. or gs://..: fsspec's own packages for them
    "s3": ["s3fs>=2023.5"],
    "gs": ["gcsfs>=2023.5"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",  # the suite in two processes
        "selenium>=4.20",  # the storybook in headless Chromium
        "pytest-benchmark>=5",  # bench/, which the suite collects and skips
        "tensorboard>=2.16",  # fastory tune
        "onnx>=1.19",  # fastory export
        "onnxscript>=0.6",
        "onnxruntime>=1.24.1",
        "fastapi>=0.115",  # fastory serve
        "uvicorn>=0.30",
        "torchmetrics>=1.5",  # fastory eval, and the oracle of CLIP-T
        "scipy>=1.13",  # fastory eval, and the oracle of FID
        "matplotlib>=3.9",  # fastory compare
        "hypothesis>=6.100",  # properties of the kernels
        "ruff>=0.12",  # lint and format
        "mypy>=1.15",  # types
        "types-PyYAML",  # the types of yaml
        "types-psutil",  # the types of psutil
    ],
}

setup(
    name="fastory",
    version="0.1.0",
    description="Turns a list of captions into a consistent sequence of pictures with Stable Diffusion UNets.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={"fastory.kernels": "kernels", "fastory.export": "export"},
    package_data={
        "fastory": ["py.typed", "GUIDE.md"],
        "fastory.runs": ["templates/*"],
        "fastory.evaluation": ["templates/*"],
        "fastory.serve": ["static/*"],
        "fastory.builtin": ["weights/**/*", "weights/*", "stories/*", "*.md"],
        "fastory.builtin.world": ["*.json"],
        "fastory.builtin.evaluation": ["*.safetensors", "pair/*"],
        "fastory.kernels.grca": ["configs/*.json"],
        "fastory.kernels.banded": ["configs/*.json"],
    },
    install_requires=install_requires,
    extras_require=extras_require,
    entry_points={"console_scripts": ["fastory = fastory.__main__:main"]},
)

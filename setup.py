from setuptools import setup

DEMO = ["gradio>=6.31"]

setup(
    name="sidfast",
    version="0.1.0",
    description="One-step text-to-image generators distilled from Stable Diffusion, without data, fast",
    python_requires=">=3.10",
    packages=["sidfast", "sidfast.kernels", *(f"sidfast.{name}" for name in (
        "accel", "checkpoints", "common", "config", "data", "engines", "evaluation", "method", "monitoring", "planning",
        "publishing", "runs", "studies", "teachers", "toy", "training"))],
    package_data={"sidfast.evaluation": ["templates/*.html"], "sidfast.studies": ["templates/*.html"]},
    package_dir={"sidfast": "sidfast", "sidfast.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.8",
        "diffusers>=0.41",
        "transformers>=5.17",
        "safetensors>=0.8",
        "huggingface_hub>=1.0",
        "xformers>=0.0.35",
        "torchmetrics>=1.9",
        "torch-fidelity>=0.4",
        "pydantic>=2.14",
        "tensorboard>=2.21",
        "pillow>=12",
        "numpy>=2.2",
        "scipy>=1.15",
        "jinja2>=3.1.6",
        "matplotlib>=3.10",
        "tqdm>=4.67",
        "psutil>=7",
        "pytest-benchmark>=5.2",
    ],
    extras_require={"demo": DEMO,
                    "test": ["pytest>=9", "pytest-xdist>=3.8", "ruff>=0.17", "hypothesis>=6.170", "playwright>=1.65",
                             *DEMO]},
    entry_points={"console_scripts": ["sidfast = sidfast.cli:main"]},
)

"""What pyproject.toml cannot say: kernels/, assets/ and configs/ are installed inside the package."""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "assets", "configs")

setup(
    packages=[*find_packages(include=["sidfast", "sidfast.*"]), *(f"sidfast.{name}" for name in FOLDERS)],
    package_dir={f"sidfast.{name}": name for name in FOLDERS},
    package_data={"sidfast": ["py.typed"], "sidfast.config": ["*.json"], "sidfast.evaluation": ["templates/*.html"],
                  "sidfast.studies": ["templates/*.html"], "sidfast.configs": ["**/*.json"],
                  "sidfast.assets": ["**/*.md", "**/*.json", "**/*.safetensors"]},
)

"""What pyproject.toml cannot say: the folder kernels/ is the package sidfast.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sidfast", "sidfast.*"]), "sidfast.kernels"],
    package_dir={"sidfast.kernels": "kernels"},
    package_data={"sidfast": ["py.typed"], "sidfast.evaluation": ["templates/*.html"],
                  "sidfast.studies": ["templates/*.html"]},
)

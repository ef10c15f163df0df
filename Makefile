# The commands of CONTRIBUTING.md under short names. Everything runs in the environment that is active.
.PHONY: setup test fast lint docs bench native clean

setup: ## editable install with all tools, and the hooks
	pip install -e '.[dev]'
	pre-commit install

test: ## every test
	pytest

fast: ## the tests of a few seconds each
	pytest -m "not slow"

lint: ## what .ci/run checks without running the code
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.hpp' | xargs clang-format --dry-run -Werror
	typos
	mypy
	lint-imports

docs: ## the pages, into site/
	mkdocs build --strict

bench: ## this machine's figures
	vit bench --models vit_base_patch16_224 --batch 1,8 --backends timm,cpu

native: ## after a change in csrc/: the cpu backend into the source tree
	cmake -S . -B build/cpu -G Ninja -DVIT_BACKEND=cpu
	cmake --build build/cpu
	cmake --install build/cpu --prefix python/vit

clean:
	rm -rf build site dist .pytest_cache .mypy_cache .ruff_cache

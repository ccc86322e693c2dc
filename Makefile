# make quickstart: from nothing to a reward model, a policy and a report on the sample rows. make test: all tests.
# Each makes .venv and installs what it needs first. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = models/SmolLM2-135M-Instruct
QUICK = outputs/quickstart

.PHONY: quickstart test test-fast lint

quickstart: $(VENV)/.installed
	$(BIN)/python setup_check.py
	$(BIN)/python -m extras.get_offline_model
	$(BIN)/python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer $(MODEL) --output_dir $(QUICK)/data
	$(BIN)/python dataset_summary.py --data_dir $(QUICK)/data --output_dir $(QUICK)/summary
	$(BIN)/python train_reward_model.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/reward_model --max_rows 160
	$(BIN)/python train_dpo.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/dpo --max_rows 48 --sample_prompts 8 --max_new_tokens 60 --reward_model $(QUICK)/reward_model --reference_cache $(QUICK)/reference_cache
	$(BIN)/python -m extras.make_report --look_in $(QUICK) --output $(QUICK)/report.html

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 to 3.13 is needed, this is ' + sys.version) if sys.version_info[:2] < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

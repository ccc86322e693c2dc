# make quickstart: train a reward model and two policies on the sample rows, and write a report.
# make assignment: train both kinds of reward model, a judge and the REINFORCE policies, and write a report.
# make test: run all tests.
# Each creates .venv and installs the requirements first. PYTHON=python3.12 chooses another interpreter.
# VENV= (empty) installs nothing and uses PYTHON as it is, for machines such as Colab.

PYTHON ?= python3
VENV ?= .venv
PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY = $(if $(VENV),$(VENV)/.installed)
READY_DEV = $(if $(VENV),$(VENV)/.installed-dev)
MODEL = models/SmolLM2-135M-Instruct
QUICK = outputs/quickstart

# make assignment, small by default; DATASET=sample_data/helpsteer_sample.jsonl START=$(MODEL) works without the hub
WORK ?= outputs/assignment
DATASET ?= nvidia/HelpSteer2
START ?= HuggingFaceTB/SmolLM2-135M-Instruct
PAIRS ?= 160
STEPS ?= 15
ANSWERS ?= 8
PROMPTS ?= 40
SEEDS ?= 1 2

.PHONY: quickstart assignment test test-fast lint types FORCE

quickstart: $(READY)
	$(PY) setup_check.py
	$(PY) -m extras.get_offline_model
	$(PY) load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer $(MODEL) --output_dir $(QUICK)/data
	$(PY) dataset_summary.py --data_dir $(QUICK)/data --output_dir $(QUICK)/summary
	$(PY) train_reward_model.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/reward_model --max_rows 160
	$(PY) train_dpo.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/dpo --max_rows 48 --sample_prompts 8 --max_new_tokens 60 --reward_model $(QUICK)/reward_model --reference_cache $(QUICK)/reference_cache
	$(PY) train_reinforce.py --data_dir $(QUICK)/data --model $(MODEL) --reward_model $(QUICK)/reward_model --output_dir $(QUICK)/reinforce --max_steps 10 --batch_size 8 --eval_prompts 32
	$(PY) -m extras.make_report --look_in $(QUICK) --output $(QUICK)/report.html

REWARD = $(PY) train_reward_model.py --data_dir $(WORK)/data --model "$(START)" --max_rows $(PAIRS)
REINFORCE = $(PY) train_reinforce.py --data_dir $(WORK)/data --model "$(START)" --judge_model $(WORK)/judge \
	--max_steps $(STEPS) --batch_size $(ANSWERS) --eval_prompts $(PROMPTS)
POLICIES = $(foreach seed,$(SEEDS),$(WORK)/scalar-$(seed) $(WORK)/distribution-$(seed))
COMMA = ,
SPACE = $(subst ,, )

assignment: $(WORK)/comparison/eval.json
	$(PY) -m extras.make_report --look_in $(WORK) --output outputs/report.html

$(MODEL)/config.json: | $(READY)
	$(PY) -m extras.get_offline_model

# The settings of the results under WORK. Other settings make everything again and move the old results aside.
# Other seeds train only the missing policies, and compare again. STAMP leaves a file alone if it would not change.
SETTINGS = $(DATASET) $(START) $(PAIRS) $(STEPS) $(ANSWERS) $(PROMPTS)
STAMP = mkdir -p $(@D); echo "$(1)" | cmp -s - $@ || echo "$(1)" > $@
$(WORK)/settings.txt: FORCE
	@$(call STAMP,$(SETTINGS))
$(WORK)/seeds.txt: FORCE
	@$(call STAMP,$(SEEDS))

$(WORK)/data/metadata.json: $(WORK)/settings.txt | $(READY) $(if $(filter $(MODEL),$(START)),$(MODEL)/config.json)
	$(PY) load_helpsteer_dataset.py --dataset "$(DATASET)" --tokenizer "$(START)" --output_dir $(@D)

$(WORK)/scalar_reward/eval.json: $(WORK)/data/metadata.json
	$(REWARD) --half even --output_dir $(@D)

$(WORK)/distribution_reward/eval.json: $(WORK)/data/metadata.json
	$(REWARD) --half even --head distribution --output_dir $(@D)

$(WORK)/judge/eval.json: $(WORK)/data/metadata.json
	$(REWARD) --half odd --output_dir $(@D)

$(WORK)/scalar-%/eval.json: $(WORK)/scalar_reward/eval.json $(WORK)/judge/eval.json
	$(REINFORCE) --reward_model $(WORK)/scalar_reward --seed $* --output_dir $(@D)

$(WORK)/distribution-%/eval.json: $(WORK)/distribution_reward/eval.json $(WORK)/judge/eval.json
	$(REINFORCE) --reward_model $(WORK)/distribution_reward --seed $* --output_dir $(@D)

$(WORK)/comparison/eval.json: $(POLICIES:%=%/eval.json) $(WORK)/seeds.txt
	$(PY) -m extras.evaluate --data_dir $(WORK)/data --model "$(START)" --reward_model $(WORK)/scalar_reward \
		--judge_model $(WORK)/judge --policies $(subst $(SPACE),$(COMMA),$(strip $(POLICIES))) \
		--prompts $(PROMPTS) --output_dir $(@D)

test: $(READY_DEV)
	$(PY) -m pytest

test-fast: $(READY_DEV)
	$(PY) -m pytest -m "not slow"

lint: $(READY_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib .

types: $(READY_DEV)
	$(PY) -m mypy

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 to 3.13 is needed, not ' + sys.version.split()[0] + ': run make $(MAKECMDGOALS) PYTHON=python3.12') if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0"
	new=$$(test -e $(VENV) || echo yes); $(PYTHON) -m venv $(VENV) || \
		{ rm -f $@; test -z "$$new" || rm -rf $(VENV); exit 1; }  # so that the next make does not use half a .venv

$(VENV)/.installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

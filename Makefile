# make quickstart: from nothing to a reward model, two policies and a report on the sample rows. make test: all tests.
# make assignment: both levels of reward model and REINFORCE, a third model as their judge, and the report on them.
# Each makes .venv and installs what it needs first. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = models/SmolLM2-135M-Instruct
QUICK = outputs/quickstart

# make assignment: the small setting; DATASET=sample_data/helpsteer_sample.jsonl START=$(MODEL) needs no hub
WORK ?= outputs/assignment
DATASET ?= nvidia/HelpSteer2
START ?= HuggingFaceTB/SmolLM2-135M-Instruct
PAIRS ?= 160
STEPS ?= 15
ANSWERS ?= 8
PROMPTS ?= 40
SEEDS ?= 1 2

.PHONY: quickstart assignment test test-fast lint FORCE

quickstart: $(VENV)/.installed
	$(BIN)/python setup_check.py
	$(BIN)/python -m extras.get_offline_model
	$(BIN)/python load_helpsteer_dataset.py --dataset sample_data/helpsteer_sample.jsonl --tokenizer $(MODEL) --output_dir $(QUICK)/data
	$(BIN)/python dataset_summary.py --data_dir $(QUICK)/data --output_dir $(QUICK)/summary
	$(BIN)/python train_reward_model.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/reward_model --max_rows 160
	$(BIN)/python train_dpo.py --data_dir $(QUICK)/data --model $(MODEL) --output_dir $(QUICK)/dpo --max_rows 48 --sample_prompts 8 --max_new_tokens 60 --reward_model $(QUICK)/reward_model --reference_cache $(QUICK)/reference_cache
	$(BIN)/python train_reinforce.py --data_dir $(QUICK)/data --model $(MODEL) --reward_model $(QUICK)/reward_model --output_dir $(QUICK)/reinforce --max_steps 10 --batch_size 8 --eval_prompts 32
	$(BIN)/python -m extras.make_report --look_in $(QUICK) --output $(QUICK)/report.html

REWARD = $(BIN)/python train_reward_model.py --data_dir $(WORK)/data --model "$(START)" --max_rows $(PAIRS)
REINFORCE = $(BIN)/python train_reinforce.py --data_dir $(WORK)/data --model "$(START)" --judge_model $(WORK)/judge \
	--max_steps $(STEPS) --batch_size $(ANSWERS) --eval_prompts $(PROMPTS)
POLICIES = $(foreach seed,$(SEEDS),$(WORK)/scalar-$(seed) $(WORK)/distribution-$(seed))
COMMA = ,
SPACE = $(subst ,, )

assignment: $(WORK)/comparison/eval.json
	$(BIN)/python -m extras.make_report --look_in $(WORK) --output outputs/report.html

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/python -m extras.get_offline_model

# what all results under WORK were made with: other settings make them again, and the older ones are moved aside;
# other seeds train the policies that are missing, and compare again. A file that stays as it is makes nothing new.
SETTINGS = $(DATASET) $(START) $(PAIRS) $(STEPS) $(ANSWERS) $(PROMPTS)
STAMP = mkdir -p $(@D); echo "$(1)" | cmp -s - $@ || echo "$(1)" > $@
$(WORK)/settings.txt: FORCE
	@$(call STAMP,$(SETTINGS))
$(WORK)/seeds.txt: FORCE
	@$(call STAMP,$(SEEDS))

$(WORK)/data/metadata.json: $(WORK)/settings.txt | $(VENV)/.installed $(if $(filter $(MODEL),$(START)),$(MODEL)/config.json)
	$(BIN)/python load_helpsteer_dataset.py --dataset "$(DATASET)" --tokenizer "$(START)" --output_dir $(@D)

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
	$(BIN)/python -m extras.evaluate --data_dir $(WORK)/data --model "$(START)" --reward_model $(WORK)/scalar_reward \
		--judge_model $(WORK)/judge --policies $(subst $(SPACE),$(COMMA),$(strip $(POLICIES))) \
		--prompts $(PROMPTS) --output_dir $(@D)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 to 3.13 is needed, this is ' + sys.version) if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0"
	new=$$(test -e $(VENV) || echo yes); $(PYTHON) -m venv $(VENV) || \
		{ rm -f $@; test -z "$$new" || rm -rf $(VENV); exit 1; }  # else the next make would take it for whole

$(VENV)/.installed: requirements.txt constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

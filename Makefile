# PY=python3 takes an environment of your own in place of .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY = .venv/bin/python
DONE = $(patsubst %/bin/python,%/done,$(filter .venv/bin/python,$(PY)))
DEV = $(DONE:done=dev)
RUN ?= runs/demo
IMAGES ?= 100
XL = benchmarks/calibration.py --model DiT-XL/2 --folder runs
.PHONY: demo test test-slow test-all lint tables compare figures bench-gpu clean

demo: $(DONE)  ## calibrate the demo DiT, quantize it to W8A8 and W6A6, sample, score
	$(PY) 01_collect_calib.py --run $(RUN) --ckpt demo/dit_mnist.pt --model DiT-Demo/4 --vae none --steps 50 --cfg-scale 2
	$(PY) 02_grad_cache.py --run $(RUN)
	$(PY) 03_quantize.py --run $(RUN) --wbits 8 --abits 8 --rows 40
	$(PY) 03_quantize.py --run $(RUN) --wbits 6 --abits 6 --rows 40
	$(PY) 04_sample.py --run $(RUN) --fp --num-images $(IMAGES)
	$(PY) 04_sample.py --run $(RUN) --wbits 8 --abits 8 --num-images $(IMAGES)
	$(PY) 04_sample.py --run $(RUN) --wbits 6 --abits 6 --num-images $(IMAGES)
	$(PY) 05_eval_fid.py --run $(RUN) --reference demo/reference_mnist.npz --features demo/features_mnist.pt
test test-slow: $(DEV)  ## in minutes, on the CPU
	$(PY) -m pytest -q -m "$(if $(filter test,$@),not )slow"
test-all: $(DEV)  ## the slow tests too, as CI does, on a core each
	$(MAKE) -j2 -O test test-slow
lint: $(DEV)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
tables compare: $(DEV)  ## on the demo DiT the paper's tables; all methods; QUICK=1: in an hour on 2 cores
	$(PY) benchmarks/$@.py $(if $(QUICK),--quick)
figures: $(DEV)  ## pictures of that sweep, into docs/; QUICK=1 as for tables
	$(PY) benchmarks/figures.py --run runs/tables/$(if $(QUICK),quick/T100_seed0,full/T250_seed0)
bench-gpu: $(DEV)  ## layers, steps and phases on a GPU, quick ones first, into benchmarks/results_gpu.md
	$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu: no GPU')"
	mkdir -p runs && $(PY) -c "import torch; print('#', torch.cuda.get_device_name())" > benchmarks/results_gpu.md
	$(PY) -m pytest -q -m gpu >> benchmarks/results_gpu.md
	for f in "engine_layers.py --dtype bf16" "sampling.py --models xl --blocks 4 --batch-size 64 --dtype bf16 --engines int8 int8-folded --rounds 7 --steps 4" "sampling.py --models xl --batch-size 64 --dtype bf16 --engines int8-folded --rounds 7 --steps 2" "sampling.py --models demo xl"; do $(PY) benchmarks/$$f || exit; done >> benchmarks/results_gpu.md
	for f in "--depth 1" --no-layers "--no-layers --compile"; do $(PY) $(XL) $$f || exit; done >> benchmarks/results_gpu.md
.venv/done .venv/dev: .venv/%: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv && .venv/bin/python -m pip install -q -r requirements$(if $(filter dev,$*),-dev).txt && touch $@
clean:  ## the virtual environment and the demo's run
	rm -rf .venv runs/demo

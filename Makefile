PYTHON ?= $(shell command -v python3.11 || command -v python3)
# make PY=python3 takes an environment of your own
PY = .venv/bin/python
READY = $(if $(filter .venv/bin/python,$(PY)),.venv/done)
RUN ?= runs/demo
DEMO = --ckpt demo/dit_mnist.pt --model DiT-Demo/4 --vae none --steps 50 --cfg-scale 2
SCORE = --reference demo/reference_mnist.npz --features demo/features_mnist.pt
IMAGES ?= 200
GPU = benchmarks/results_gpu.md

.PHONY: bench-gpu demo tables figures test lint clean

demo: $(READY)  ## the five phases on the demo DiT: FP, W8A8, W6A6
	$(PY) 01_collect_calib.py --run $(RUN) $(DEMO)
	$(PY) 02_grad_cache.py --run $(RUN)
	$(PY) 03_quantize.py --run $(RUN) --wbits 8 --abits 8 --rows 40
	$(PY) 03_quantize.py --run $(RUN) --wbits 6 --abits 6 --rows 40
	$(PY) 04_sample.py --run $(RUN) --fp --num-images $(IMAGES)
	$(PY) 04_sample.py --run $(RUN) --wbits 8 --abits 8 --num-images $(IMAGES)
	$(PY) 04_sample.py --run $(RUN) --wbits 6 --abits 6 --num-images $(IMAGES)
	$(PY) 05_eval_fid.py --run $(RUN) $(SCORE)

tables: $(READY)  ## the paper's tables on the demo DiT; QUICK=1: half an hour on 2 cores
	$(PY) benchmarks/tables.py $(if $(QUICK),--quick)

figures: $(READY)  ## pictures of that sweep, into demo/; QUICK=1 as for tables
	$(PY) benchmarks/figures.py --run $(if $(QUICK),runs/tables/quick/T100_seed0,runs/tables/full/T250_seed0)

bench-gpu: $(READY)  ## every figure that needs a GPU, into benchmarks/results_gpu.md
	$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu: no GPU')"
	$(PY) -c "import torch; print('#', torch.cuda.get_device_name())" > $(GPU)
	mkdir -p runs
	$(PY) benchmarks/calibration.py --model DiT-XL/2 --no-layers --folder runs >> $(GPU)
	$(PY) benchmarks/calibration.py --model DiT-XL/2 --no-layers --compile --folder runs >> $(GPU)
	$(PY) benchmarks/calibration.py --model DiT-XL/2 --depth 1 --folder runs >> $(GPU)
	$(PY) benchmarks/sampling.py --models demo xl >> $(GPU)
	$(PY) -m pytest -q -m gpu >> $(GPU)

test: $(READY)  ## every test, on the CPU
	$(PY) -m pytest -q

lint: $(READY)
	$(PY) -m ruff check .

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

clean:  ## the virtual environment and the demo's run
	rm -rf .venv runs/demo

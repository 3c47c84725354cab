# Two commands: `make demo` shows it, `make test` checks it.  Each sets up .venv first, if it is not there.
PYTHON ?= python3

help:
	@echo "make demo    set up, then make earphones, learn them, diffuse, and sample new ones"
	@echo "make test    set up, then run the tests"
	@echo "make bench   set up, then measure the rasteriser's and the renderer's speed"
	@echo "make clean   remove .venv; data/ and runs/ are yours and stay"

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	touch .venv/ready

demo: .venv/ready
	.venv/bin/python render_shapenet.py
	.venv/bin/python autodecoder.py
	.venv/bin/python diffusion.py
	.venv/bin/python sample.py

test: .venv/ready
	.venv/bin/python -m pytest -q tests

bench: .venv/ready
	.venv/bin/python tests/bench.py --render

clean:
	rm -rf .venv

.PHONY: help demo test bench clean

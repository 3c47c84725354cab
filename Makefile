# Two commands: `make demo` shows it, `make test` checks it.  Each sets up .venv first, if it is not there.
PYTHON ?= python3
RUN = .venv/bin/python

help:
	@echo "make demo    set up, show new earphones of the model in the box, then train one from scratch and show its own"
	@echo "make test    set up, then run the tests"
	@echo "make bench   set up, then measure the speed of the rasteriser and the renderer"
	@echo "make clean   remove .venv; data/, runs/ and samples/ are yours and stay"

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	touch .venv/ready

demo: .venv/ready
	$(RUN) sample.py --diffusion pretrained/diffusion --out samples/pretrained
	@echo; echo "Look at samples/pretrained/sheet.png and viewer.html. Now to train one from scratch: most of an hour on a CPU without bf16"; echo
	$(RUN) render_shapenet.py
	$(RUN) autodecoder.py
	$(RUN) diffusion.py
	$(RUN) sample.py
	@echo; echo "samples/beside.png: your model's earphones above, those of the model in the box below"

test: .venv/ready
	$(RUN) -m pytest -q -n 2 --dist loadfile tests

bench: .venv/ready
	$(RUN) tests/bench.py --render

clean:
	rm -rf .venv

.PHONY: help demo test bench clean

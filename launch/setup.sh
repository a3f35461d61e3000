# Sourced by the other scripts, from the root of the repository: makes .venv if it is not there, and enters it.
if [[ ! -f .venv/ready ]]; then
    "${PYTHON:-python3}" -m venv --clear .venv
    # torch by itself first: the pinned version, from wherever pip finds it, before anything else asks for a torch.
    .venv/bin/pip install --quiet --constraint constraints.txt torch
    .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
    # Without its dependencies: they pin an old nnsight, which the test of its format does without.
    .venv/bin/pip install --quiet --no-deps dictionary-learning==0.1.0
    touch .venv/ready
fi
source .venv/bin/activate

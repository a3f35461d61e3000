# Sourced by the other scripts, from the root of the repository: makes .venv if it is not there, and enters it.
if [[ ! -f .venv/ready ]]; then
    "${PYTHON:-python3}" -m venv --clear .venv
    # torch by itself first: the pinned version, from wherever pip finds it, before anything else asks for a torch.
    .venv/bin/pip install --quiet --constraint constraints.txt torch
    .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
    touch .venv/ready
fi
source .venv/bin/activate

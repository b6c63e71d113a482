# What is typed often. `just --list` shows it. Without just, run the line below a name.

# Set up and run style, types and the tests of every day.
test *arguments:
    scripts/test {{arguments}}

# All tests, as CI runs them.
ci:
    .ci/run

# Style, spelling, types and the generated page alone.
lint:
    scripts/lint

# Mend what ruff can mend, and wrap the pages.
format:
    scripts/lint --fix

# Write the generated page, and check the links of all pages.
docs:
    bash -c 'source scripts/setup_env dev'
    .venv/bin/python scripts/gen_reference.py
    .venv/bin/pytest tests/test_doc_links.py

# Compress the demo model into out/demo.
demo:
    scripts/demo

"""LlamaIndex's OpenAIFinetuneEngine: upload, train, and ask what came of it.

The package's own __init__ imports every engine it has, torch among them; it is passed over, the
engine for OpenAI is taken as it is. `validate_json` fetches a tokenizer of OpenAI's, so it is off.
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path

URL, MODEL = (os.environ[f"SCENARIO_{name}"] for name in ("URL", "MODEL"))
os.environ |= {"OPENAI_BASE_URL": URL, "OPENAI_API_KEY": "none"}

found = importlib.util.find_spec("llama_index.finetuning")
assert found is not None and found.submodule_search_locations
package = types.ModuleType("llama_index.finetuning")
package.__path__ = list(found.submodule_search_locations)
sys.modules["llama_index.finetuning"] = package

import openai  # noqa: E402
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.finetuning.openai.base import OpenAIFinetuneEngine  # noqa: E402
from llama_index.llms.openai_like import OpenAILike  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "rows.jsonl")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    engine = OpenAIFinetuneEngine(MODEL, str(data), verbose=True, validate_json=False)
    engine.finetune()

job = engine.get_current_job()
assert (job.model, job.fine_tuned_model) == (MODEL, None)
try:
    engine.get_finetuned_model()
except ValueError as error:
    assert "does not have a finetuned model id ready" in str(error)
deadline = time.monotonic() + 120
while job.status in ("validating_files", "queued", "running"):
    assert time.monotonic() < deadline, job
    time.sleep(0.2)
    job = engine.get_current_job()
assert job.status == "succeeded", job
assert job.trained_tokens

again = OpenAIFinetuneEngine(MODEL, "", start_job_id=job.id, validate_json=False)
llm = again.get_finetuned_model(temperature=0.0)
assert llm.model == job.fine_tuned_model
# Its class answers for models of OpenAI's names alone; the name is what counts.
chat = OpenAILike(model=llm.model, is_chat_model=True, api_base=URL, api_key="none", max_tokens=4)
assert chat.chat([ChatMessage(role="user", content="Who?")]).message.content

try:
    OpenAIFinetuneEngine("no-such-model", __file__, validate_json=False).finetune()
except openai.BadRequestError as error:
    assert "must end in one of" in str(error)
else:
    raise AssertionError("a file that is no training data was not refused")

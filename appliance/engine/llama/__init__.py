"""GGUF models over llama.cpp: continuous batching of many sequences in one context.

One step is schedule → decode → sample → deliver, told by `runner.Runner.step`:

- `cells`      which KV cells are whose (pure)
- `prefix`     what sequences share (pure)
- `parked`     which states of idle sequences are kept in RAM and on disk (pure)
- `ranges`     which parts of a memory are taken (pure)
- `buffers`    memory for parked states
- `state_format`, `state_files`   their files
- `keeper`, `file_lane`   copy, write and read them
- `memory`     what each kind of memory can take back (pure)
- `cost`       what a step costs (pure)
- `lookup`     where the last tokens occurred before (pure)
- `speculation` which tokens are guessed ahead (pure)
- `step`       what the scheduler is given and answers with (pure)
- `scheduler`  who runs next, on which tokens (pure)
- `text`       bytes become characters, stop strings are held back (pure)
- `sampling`   a logits row becomes a token
- `constraint` which tokens a grammar allows next
- `model`      weights and vocabulary
- `context`    KV memory and decoding
- `turns`      which adapter's step is next (pure)
- `lora`       a loaded adapter
- `fairness`   whose turn it is among tenants (pure)
- `residents`  who holds which cells, and what of them can be reused (pure)
- `runner`     one loaded model at work
- `commands`   what the loop and the thread tell each other
- `worker`     the thread
- `engine`     the event loop's side of the thread
"""

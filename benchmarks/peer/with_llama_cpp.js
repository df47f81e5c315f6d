// llama.cpp's mtmd through the npm package @fugood/llama.node, which ships it compiled:
//
// node ADAPTER.js ask CHECKPOINT OUT VARIANT
//
// OUT holds node_modules, model.gguf and mmproj.gguf. Speaks as serve.py does, on descriptor 3: the library prints to stdout.
const { createRequire } = require('module')
const fs = require('fs')
const path = require('path')
const readline = require('readline')

const [verb, , out] = process.argv.slice(2)
const threads = Number(process.env.OMP_NUM_THREADS || 1)
const send = (message) => fs.writeSync(3, JSON.stringify(message) + '\n')
// Milliseconds of the processor: on one thread, those on an idle core's clock.
const now = () => {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e3
}
const peak = () => 1024 * Number(fs.readFileSync('/proc/self/status', 'utf8').match(/VmHWM:\s+(\d+)/)[1])

const main = async () => {
  if (verb !== 'ask') throw new Error(`NotImplementedError: no ${verb} for this peer`)
  const { loadModel } = createRequire(path.join(path.resolve(out), 'here.js'))('@fugood/llama.node')
  const began = performance.now()
  const sizes = { n_ctx: 8192, n_batch: 2048, n_ubatch: 512, n_parallel: 1 }
  const context = await loadModel({ model: path.join(out, 'model.gguf'), n_gpu_layers: 0, n_threads: threads, ...sizes })
  const projector = path.join(out, 'mmproj.gguf')
  if (!(await context.initMultimodal({ path: projector, use_gpu: false }))) throw new Error('mmproj.gguf: not loaded')
  send({ load_seconds: (performance.now() - began) / 1e3, peak_memory_bytes: peak() })
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { picture, question, tokens, exact } = JSON.parse(line)
    const content = [
      { type: 'image_url', image_url: { url: picture } },
      { type: 'text', text: question },
    ]
    const milliseconds = []
    const started = now()
    const result = await context.completion(
      { messages: [{ role: 'user', content }], jinja: true, temperature: 0, n_predict: tokens, ignore_eos: exact },
      () => milliseconds.push(now() - started),
    )
    const prompt_tokens = result.tokens_evaluated
    send({ text: result.text, milliseconds, prompt_tokens, timings: result.timings, peak_memory_bytes: peak() })
  }
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error.message.includes('Error:') ? error.message : `Error: ${error.message}`)
    process.exit(1)
  },
)

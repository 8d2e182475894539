// Tasks over threads, and the sums over tasks.

// Frames are kept for all steps where they take less than this, in bytes for each task at work; else the adjoint
// recursion computes values and gradients of a step once more.
constexpr int64_t kKeepFrames = int64_t(96) << 20;
// Transposed filters are kept too where all that is kept stays in the second cache; from further away they come no faster
// than they are made.
constexpr int64_t kKeepTransposed = int64_t(1) << 20;
// Tasks are not shared out where that would take more than this, but each is worked on by all threads.
constexpr int64_t kSideBySide = int64_t(96) << 20;
// Fewer tasks than this do not go abreast: half as many pieces of work might leave threads without any.
constexpr int64_t kManyTasks = 16;

template <class T>
Task<T> plan_task(const Call<T>& call, const Network& net, const Machine& machine, Crew crew, int64_t& bytes) {
  Task<T> task{call, machine, net, crew};
  const int64_t frame = (2 * net.frame_sample + net.frame_saved_sample) * call.support.samples * sizeof(T);
  const bool keeps = call.mode == kMeta && !call.first_order && call.steps <= kKeepFrames / larger<int64_t>(1, frame);
  task.kept_frames = keeps ? call.steps : 0;
  const int64_t step = frame + (net.adapted + net.transposed) * int64_t(sizeof(T));
  task.kept_transposed = keeps && call.steps && call.steps <= kKeepTransposed / step;
  Bump count{nullptr, 0};
  task.lay_out(count);
  bytes = count.used;
  return task;
}

// Sums over tasks, in the engine's layout of one: of gradients (parameters, rows of rates) and of single rates. Tasks are
// added up in groups, and those as a tree, so that sums have an order that no number of threads changes.
template <class T>
struct Sums {
  int64_t groups, extent, numbers;  // of a group: parameters, single rates
  T* parameters;
  double* rates;

  void lay_out(Bump& m) {
    rates = m.take<double>(groups * numbers);
    parameters = m.take<T>(groups * extent);
  }
  // The first task of a group sets the sum of gradients; to those of rates all tasks add.
  void clear(bool rows) const {
    for (int64_t i = 0; i < groups * numbers; i++) rates[i] = 0;
    for (int64_t i = 0; rows && i < groups * extent; i++) parameters[i] = 0;
  }
  // Groups from `begin` on, a multiple of `size`, which is a power of two: the halves are sums already.
  void add(int64_t begin, int64_t size) const {
    const int64_t half = begin + size / 2;
    T* to = parameters + begin * extent;
    combine_parameters<T>(extent, to, to, parameters + half * extent, T(1), nullptr);
    for (int64_t i = 0; i < numbers; i++) rates[begin * numbers + i] += rates[half * numbers + i];
  }
};

// Tasks `first` and on, as many abreast as the network takes; their groups are numbered from `at` on.
template <class T>
struct Share {
  const Network& net;
  int64_t first, tasks, at, groups;

  int64_t units() const { return tasks / net.abreast; }

  void run(Task<T>& task, const Sums<T>& sums, int64_t g) const {
    const Call<T>& call = task.call;
    T* of_theta = sums.parameters + (at + g) * sums.extent;
    double* of_rates = sums.numbers ? sums.rates + (at + g) * sums.numbers : nullptr;
    T* rows = call.to_rates && call.per_parameter ? of_theta + (call.reduce ? call.net->adapted : 0) : nullptr;
    const int64_t begin = units() * g / groups;
    for (int64_t u = begin; u < units() * (g + 1) / groups; u++) {
      task.run(first + u * net.abreast, call.reduce ? of_theta : nullptr, u == begin, of_rates, rows);
      // Two vectors that take turns do not keep it.
      task.loaded = call.shared && (task.many_thetas() || call.steps < 2);
    }
  }
};

template <class T>
struct Work {
  const Call<T>& call;
  const Machine& machine;
  Crew crew;
  Share<T> share, rest;  // rest: the odd task, where the others go two abreast
  Sums<T> sums;
  int64_t workers;
  char *const *memory, *rest_memory;  // of each worker, for one Task

  int64_t first(int64_t worker) const { return share.groups * worker / workers; }

  // Sums that lie within the groups of a worker are added while they are in its cache, the others at the end.
  void groups(const Share<T>& s, int64_t begin, int64_t end, char* at) const {
    int64_t bytes = 0;
    Task<T> task = plan_task<T>(call, s.net, machine, crew, bytes);
    Bump bump{at, 0};
    task.lay_out(bump);
    task.begin();
    for (int64_t g = begin; g < end; g++) {
      s.run(task, sums, g);
      const int64_t done = s.at + g + 1;
      for (int64_t size = 2; done % size == 0 && s.at + begin <= done - size; size *= 2) sums.add(done - size, size);
    }
  }
  static void some(void* context, int64_t begin, int64_t end) {
    const Work& w = *(const Work*)context;
    for (int64_t worker = begin; worker < end; worker++) {
      w.groups(w.share, w.first(worker), w.first(worker + 1), w.memory[worker]);
      // Where groups do not come out even, the first worker has fewer of them.
      if (worker == 0 && w.rest.tasks) w.groups(w.rest, 0, 1, w.rest_memory);
    }
  }
  void add_rest() const {
    if (!sums.extent && !sums.numbers) return;
    for (int64_t size = 2; size < 2 * sums.groups; size *= 2)
      for (int64_t begin = 0, worker = 0; begin + size / 2 < sums.groups; begin += size) {
        while (first(worker + 1) <= begin) worker++;
        if (begin + size > first(worker + 1)) sums.add(begin, size);
      }
  }
};

// Tasks two abreast fill vectors that the channels of one would not. Samples that are left out would have to be the same
// of both.
template <class T>
bool goes_abreast(const Call<T>& call) {
  return sizeof(T) == 4 && call.net->pairs && call.mode == kMeta && call.reduce && call.shared &&
         call.tasks >= kManyTasks && !call.support.weight && !call.query.weight;
}

template <class T>
void run(const Call<T>& call, const Machine& machine) {
  const Network& net = goes_abreast(call) ? *call.net->pairs : *call.net;
  const bool rows = call.to_rates && call.per_parameter;
  const int64_t odd = call.tasks % net.abreast, threads = machine.threads;
  Sums<T> sums{call.tasks / net.abreast, ((call.reduce ? 1 : 0) + (rows ? call.rate_rows : 0)) * call.net->adapted,
               call.to_rates && !rows ? call.rate_rows : 0};
  constexpr int64_t kSums = int64_t(8) << 20;  // bytes
  if (sums.extent)
    sums.groups = smaller(sums.groups, larger<int64_t>(8, kSums / (sums.extent * int64_t(sizeof(T)))));
  const Share<T> share{net, 0, call.tasks - odd, 0, sums.groups}, rest{*call.net, call.tasks - odd, odd, sums.groups, 1};
  sums.groups += odd;
  Work<T> work{call, machine, {}, share, rest, sums, 1};
  int64_t bytes = 0, rest_bytes = 0;
  const Task<T> planned = plan_task<T>(call, net, machine, {}, bytes);
  if (odd) plan_task<T>(call, *call.net, machine, {}, rest_bytes);
  const int64_t units = share.units(), samples = larger(call.support.samples, call.query.samples);
  const bool small = net.work <= Crew::kWorthwhile / 2 / larger<int64_t>(1, samples);  // no rule would be shared out
  if ((units >= 4 * threads || units % threads == 0 || small) && bytes * threads <= kSideBySide)
    work.workers = smaller(threads, share.groups);
  else if (threads > 1)
    work.crew = {machine.split, threads};

  constexpr int64_t kWorkers = 1024;
  char* memory[kWorkers];
  work.workers = smaller(work.workers, kWorkers);
  auto take = [&](const Network& of, int64_t size) {
    const int64_t key[8] = {of.serial, call.mode, call.support.samples, call.query.samples, call.steps,
                            planned.kept_frames, rows ? call.rate_rows : call.per_parameter, planned.many_gradients()};
    return (char*)machine.take(size, key);
  };
  for (int64_t w = 0; w < work.workers; w++) memory[w] = take(net, bytes);
  work.memory = memory;
  work.rest_memory = odd ? take(*call.net, rest_bytes) : nullptr;
  const int64_t none[8] = {-1};
  Bump count{nullptr, 0};
  work.sums.lay_out(count);
  Bump bump{(char*)machine.take(count.used, none), 0};
  work.sums.lay_out(bump);
  work.sums.clear(rows);

  if (work.workers > 1)
    machine.split(work.workers, 1, &work, &Work<T>::some);
  else
    Work<T>::some(&work, 0, 1);

  work.add_rest();
  auto unload = [&](int64_t which, T* to) {
    for (int64_t i = 0; i < net.parameters; i++) to[i] = 0;
    from_engine<T>(*call.net, work.sums.parameters + which * call.net->adapted, to);
  };
  if (call.reduce) unload(0, call.to_theta);
  for (int64_t i = 0; i < sums.numbers; i++) call.to_rates[i] = T(work.sums.rates[i]);
  for (int64_t r = 0; rows && r < call.rate_rows; r++)
    unload((call.reduce ? 1 : 0) + r, call.to_rates + r * net.parameters);
  machine.give(bump.base);
  if (odd) machine.give(work.rest_memory);
  for (int64_t w = 0; w < work.workers; w++) machine.give(memory[w]);
}

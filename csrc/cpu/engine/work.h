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

// Tasks `first` and on, as many abreast as the network takes, in groups: so that sums over tasks have an order that no
// number of threads changes.
template <class T>
struct Share {
  const Network& net;
  int64_t first, tasks, groups;
  int64_t extent, numbers;  // of the sums of a group: parameters, single rates
  T* theta_sums;
  double* rate_sums;

  int64_t units() const { return tasks / net.abreast; }

  void lay_out(Bump& m) {
    rate_sums = m.take<double>(groups * numbers);
    theta_sums = m.take<T>(groups * extent);
  }
  // The first task of a group sets the sum of gradients; to those of rates all tasks add.
  void clear(bool rows) const {
    for (int64_t i = 0; i < groups * numbers; i++) rate_sums[i] = 0;
    for (int64_t i = 0; rows && i < groups * extent; i++) theta_sums[i] = 0;
  }

  void run(Task<T>& task, int64_t g) const {
    const Call<T>& call = task.call;
    T* sums = theta_sums + g * extent;
    double* to_rate = numbers ? rate_sums + g * numbers : nullptr;
    T* rows = call.to_rates && call.per_parameter ? sums + (call.reduce ? net.adapted : 0) : nullptr;
    const int64_t begin = units() * g / groups;
    for (int64_t u = begin; u < units() * (g + 1) / groups; u++) {
      task.run(first + u * net.abreast, call.reduce ? sums : nullptr, u == begin, to_rate, rows);
      // Two vectors that take turns do not keep it.
      task.loaded = call.shared && (task.many_thetas() || call.steps < 2);
    }
  }

  // The sums of groups are added up as a tree: those of `size` groups, a power of two, from a multiple of it on, in two
  // halves. What lies within the groups of a worker it adds while they are in its cache, the rest comes at the end.
  void add(int64_t begin, int64_t size) const {
    const int64_t half = begin + size / 2;
    T* to = theta_sums + begin * extent;
    combine_parameters<T>(extent, to, to, theta_sums + half * extent, T(1), nullptr);
    for (int64_t i = 0; i < numbers; i++) rate_sums[begin * numbers + i] += rate_sums[half * numbers + i];
  }
};

template <class T>
struct Work {
  const Call<T>& call;
  const Machine& machine;
  Crew crew;
  Share<T> share, rest;  // rest: the odd task, where the others go two abreast
  int64_t workers;
  char *const *memory, *rest_memory;  // of each worker, for one Task

  int64_t first(int64_t worker) const { return share.groups * worker / workers; }

  void groups(const Share<T>& s, int64_t begin, int64_t end, char* at) const {
    int64_t bytes = 0;
    Task<T> task = plan_task<T>(call, s.net, machine, crew, bytes);
    Bump bump{at, 0};
    task.lay_out(bump);
    task.begin();
    for (int64_t g = begin; g < end; g++) {
      s.run(task, g);
      for (int64_t size = 2; (g + 1) % size == 0 && begin <= g + 1 - size; size *= 2) s.add(g + 1 - size, size);
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
    if (!share.extent && !share.numbers) return;
    for (int64_t size = 2; size < 2 * share.groups; size *= 2)
      for (int64_t begin = 0, worker = 0; begin + size / 2 < share.groups; begin += size) {
        while (first(worker + 1) <= begin) worker++;
        if (begin + size > first(worker + 1)) share.add(begin, size);
      }
  }

  // The sums of a share from `at` on, as [P].
  void unload(const Share<T>& s, int64_t at, T* to) const {
    T* from = s.theta_sums + at;
    if (s.net.abreast == 2)
      for (int64_t i = 0; i < s.net.adapted; i += 2) from[i] += from[i + 1];
    for (int64_t i = 0; i < s.net.parameters; i++) to[i] = 0;
    from_engine<T>(s.net, from, to);
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
  auto plan_share = [&](const Network& of, int64_t first, int64_t tasks) {
    Share<T> s{of, first, tasks, tasks / of.abreast};
    s.extent = ((call.reduce ? 1 : 0) + (rows ? call.rate_rows : 0)) * of.adapted;
    s.numbers = call.to_rates && !rows ? call.rate_rows : 0;
    constexpr int64_t kSums = int64_t(8) << 20;  // bytes
    if (s.extent) s.groups = smaller(s.groups, larger<int64_t>(8, kSums / (s.extent * int64_t(sizeof(T)))));
    return s;
  };
  const int64_t odd = call.tasks % net.abreast, threads = machine.threads;
  Work<T> work{call, machine, {nullptr}, plan_share(net, 0, call.tasks - odd),
               plan_share(*call.net, call.tasks - odd, odd), 1};
  int64_t bytes = 0, rest_bytes = 0;
  const Task<T> planned = plan_task<T>(call, net, machine, {nullptr}, bytes);
  if (odd) plan_task<T>(call, *call.net, machine, {nullptr}, rest_bytes);
  const int64_t units = work.share.units(), samples = larger(call.support.samples, call.query.samples);
  const bool small = net.work <= Crew::kWorthwhile / 2 / larger<int64_t>(1, samples);  // no rule would be shared out
  if ((units >= 4 * threads || units % threads == 0 || small) && bytes * threads <= kSideBySide)
    work.workers = smaller(threads, work.share.groups);
  else if (threads > 1)
    work.crew.split = machine.split;

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
  Bump count{nullptr, 0}, sums;
  auto lay_out = [&](Bump& m) {
    work.share.lay_out(m), work.rest.lay_out(m);
    return m.take<T>(odd ? net.parameters : 0);
  };
  lay_out(count);
  sums = {(char*)machine.take(count.used, none), 0};
  T* of_rest = lay_out(sums);
  work.share.clear(rows), work.rest.clear(rows);

  if (work.workers > 1)
    machine.split(work.workers, 1, &work, &Work<T>::some);
  else
    Work<T>::some(&work, 0, 1);

  work.add_rest();
  auto result = [&](int64_t which, T* to) {
    work.unload(work.share, which * net.adapted, to);
    if (!odd) return;
    work.unload(work.rest, which * call.net->adapted, of_rest);
    for (int64_t i = 0; i < net.parameters; i++) to[i] += of_rest[i];
  };
  if (call.reduce) result(0, call.to_theta);
  for (int64_t i = 0; i < work.share.numbers; i++)
    call.to_rates[i] = T(work.share.rate_sums[i] + (odd ? work.rest.rate_sums[i] : 0));
  if (rows)
    for (int64_t r = 0; r < call.rate_rows; r++) result((call.reduce ? 1 : 0) + r, call.to_rates + r * net.parameters);
  machine.give(sums.base);
  if (odd) machine.give(work.rest_memory);
  for (int64_t w = 0; w < work.workers; w++) machine.give(memory[w]);
}
